"""Whether what was saved fits an optimizer, in words."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path

from ..config import ConfigError
from ..config.param_groups import in_block, is_low_rank, parameter_name
from ..core.factors import SQUARES
from ..optimizers.base import LowRankOptimizer
from ..state.state_dict import restore_groups
from .content import Content
from .entries import RANKS, Entry, LowRank, Trained
from .files import CheckpointError


def differences(
    saved: Content,
    present: Mapping[str, Trained],
    untrained: Container[str],
    groups: int,
    resize: bool,
) -> list[str]:
    """How the optimizer (``present``: :func:`content.parameters`, of all ranks) differs from what was saved, in words.

    What was frozen then and is trained now begins with fresh state; what is frozen now (``untrained``) needs none. With
    ``resize``, other ranks of the factors are no difference.
    """
    then = saved.trained
    was, now = _kinds(then), _kinds(present)
    moved = {name for name in was.keys() & now.keys() if was[name] != now[name]}  # a stack has other names then
    fresh = {n: e for n, e in present.items() if n not in then and parameter_name(n) not in moved}
    stacks = {parameter_name(n) for n in fresh} & saved.parameters.keys() - fresh.keys()
    found = [f"{n} was frozen, and a stack of matrices that was cannot go on as trained" for n in sorted(stacks)]
    found += shape_differences(saved, {n: e.shape for n, e in fresh.items() if parameter_name(n) not in stacks})
    gone = [n for n in sorted(then.keys() - present.keys()) if n not in untrained and parameter_name(n) not in moved]
    found += [f"{name} is in it, but no trained parameter here" for name in gone]
    alike: dict[str, list[str]] = {}
    for name in sorted(moved):
        alike.setdefault(f"kind was {was[name]}, is {now[name]}", []).append(name)
    for name in sorted(then.keys() & present.keys()):
        if parameter_name(name) not in moved and (text := _difference(then[name], present[name], resize)):
            alike.setdefault(text, []).append(name)
    found += [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}" for text, names in alike.items()]
    if moved and (targets := _targets(saved)):
        found.append(f"target_modules={json.dumps(targets)} selects what was low-rank in it")
    if len(saved.param_groups) != groups:
        found.append(f"it has {len(saved.param_groups)} parameter groups, the optimizer {groups}")
    return found


def _kinds(parameters: Mapping[str, Entry]) -> dict[str, str]:
    # AdamW's moments are converted where they are in 8 bits on one side alone.
    coded = {name for name, entry in parameters.items() if isinstance(entry, Trained) and entry.coded}
    return {parameter_name(n): Trained.kind if n in coded else entry.kind for n, entry in parameters.items()}


def _difference(then: Trained, present: Trained, resize: bool) -> str | None:
    """The first difference between a parameter's entries, in words."""
    if then.coded != present.coded:
        return None if then.shape == present.shape else f"shape was {list(then.shape)}, is {list(present.shape)}"
    was, roots = then.to_json(), {square: root for root, square in SQUARES.items()}
    if isinstance(then, LowRank):
        was["vectors"] = [roots.get(square, square) for square in then.vectors]
    for key, now in present.to_json().items():
        rank = key in RANKS.values()
        if key not in ("step", "forms", "weights") and was.get(key) != now and not (resize and rank):
            hint = " (resize_rank=True, or a program's --resize_rank, adapts it)" if rank else ""
            return f"{key} was {was.get(key)}, is {now}{hint}"
    return None


def _targets(saved: Content) -> list[str] | None:
    """``target_modules`` that select what was low-rank in a checkpoint, if a few names do."""
    low_rank = saved.low_rank
    if len({tuple(entry.ranks.items()) for entry in low_rank.values()}) != 1:
        return None
    ranks = next(iter(low_rank.values())).ranks
    rank, rank_v = ranks["m"], ranks.get("v")
    targets = set()
    for name in low_rank:
        inside, numbered = in_block(parameter_name(name).split("."))
        targets.add(".".join(inside[2 if numbered else 0 :]).removesuffix(".weight"))
    listed = sorted(targets)
    right = all((n in low_rank) == is_low_rank(n, e.shape, rank, rank_v or 1, listed) for n, e in saved.trained.items())
    return listed if right and len(listed) <= 40 else None


def unusable_groups(saved: Content, optimizer: LowRankOptimizer) -> list[str]:
    """Options of saved parameter groups that the optimizer cannot take, in words."""
    found = []
    for k, (present, options) in enumerate(zip(optimizer.param_groups, saved.param_groups, strict=False)):
        merged = {**present, "params": []}
        try:
            if "lr" not in options:
                raise ConfigError("it has no lr")
            restore_groups([merged], [options])
            optimizer.group_config(merged)
            for key, value in options.items():
                if isinstance(present.get(key), float) and isinstance(value, (str, list, dict)):  # a scheduler's, say
                    raise ConfigError(f"{key}={value!r:.80}: must be a number")
        except (ValueError, TypeError, RuntimeError) as error:  # ConfigError is a ValueError
            found.append(f"parameter group {k}: {error}")
    return found


def shape_differences(saved: Content, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Of tensors here, by name and shape: which are not in a checkpoint, or of another shape there, in words."""
    found = []
    for name, shape in shapes.items():
        then = saved.parameters.get(name)
        if then is None:
            found.append(f"{name} is not in it")
        elif then.shape != tuple(shape):
            found.append(f"{name}: shape was {list(then.shape)}, is {list(shape)}")
    return found


def complain(path: Path, found: list[str]) -> None:
    """Raise a CheckpointError that lists the differences, if there are any."""
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise CheckpointError(f"checkpoint {path} does not fit: " + "; ".join(found[:8]) + more)
