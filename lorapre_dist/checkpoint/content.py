"""What a checkpoint says about its tensors, and whether they fit an optimizer.

``checkpoint.json`` in a checkpoint:

    {"format": 2, "version": "0.1.0", "layout": "ZeRO-2", "world_size": 4, "step": 1000,
     "aliases": {NAME: NAME of the tensor it is tied to},
     "parameters": {NAME: {"kind": "lorapre", "optimizer": "LoRAPre", "variant": "stable", "rank": r, "rank_v": s,
                           "vectors": ["rms_row"], "forms": {"m": "8bit", "v": "8bit"}, "shape": [p, q], "step": n}
                          | {"kind": "adamw", "shape": [...], "step": n},
                          and "weights": "kahan" where the bits are saved that its 16-bit weights lack,
                          | {"kind": "untrained", "shape": [...]}},
     "param_groups": [{"lr": ..., "rank": ..., ...}]}

``forms`` says how factors are kept that are not in fp32 (``core/forms.py``); without it all are.

Format 1 had factors of any size, perhaps not finite, and mean squares, ``v_row`` and ``v_col``, for their roots. It can
be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.options import STATE_DTYPES
from ..config.param_groups import in_block, is_low_rank, parameter_name
from ..core.factors import SQUARES, Matrix
from ..core.rounding import COMPENSATION
from ..optimizers.base import LowRankOptimizer
from ..state.state_dict import plain_groups, restore_groups
from . import files, folder
from .files import CheckpointError

FILE = folder.DESCRIPTION
FORMAT = 2
TENSORS = "tensors"
#: What says the rank of each moment's factors; an optimizer without a low-rank second moment has no ``rank_v``.
RANKS = {"m": "rank", "v": "rank_v"}


def parameters(optimizer: LowRankOptimizer) -> dict[str, dict[str, Any]]:
    """What this rank's optimizer holds, by parameter name."""
    found = {}
    for bound in optimizer.bound():
        entry: dict[str, Any] = {"shape": list(bound.piece.shape), "step": bound.state.step}
        if isinstance(bound.state, Matrix):
            state = bound.state
            identity = {"optimizer": state.optimizer, "variant": state.variant, "vectors": list(state.vectors)}
            ranks = {RANKS[moment]: rank for moment, rank in state.ranks.items()}
            forms = {moment: form for moment, form in state.forms.items() if form != "fp32"}
            entry = {"kind": "lorapre", **identity, **ranks, **({"forms": forms} if forms else {}), **entry}
        else:
            entry = {"kind": "adamw", **entry}
        if COMPENSATION in bound.state.rounding.tensors():
            entry["weights"] = "kahan"
        found[bound.piece.name] = entry
    return found


def describe(optimizer: LowRankOptimizer, held: list[dict[str, dict[str, Any]]], **more: Any) -> dict[str, Any]:
    """The content of ``checkpoint.json``; ``held`` is :func:`parameters` of every rank."""
    assert optimizer.layout is not None
    merged: dict[str, dict[str, Any]] = {}
    for part in held:
        merged.update(part)
    return {
        "format": FORMAT,
        "layout": optimizer.layout.name,
        "world_size": len(held),
        "parameters": merged,
        "param_groups": plain_groups(optimizer.param_groups),
        **more,
    }


def read(path: Path) -> dict[str, Any]:
    """``checkpoint.json`` of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    try:
        content = files.read_object(path / FILE)
    except (CheckpointError, OSError) as error:
        reason = str(error).removeprefix(f"{path / FILE} ")
        raise CheckpointError(f"checkpoint {path}: {FILE} {reason}") from error
    if "parameters" not in content:
        raise CheckpointError(f"checkpoint {path}: {FILE} does not describe one")
    if content.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"checkpoint {path} holds tensors in format {content.get('format')!r:.80}; this version reads 1 "
            f"and {FORMAT}"
        )
    if problem := next(_wrong(content), None):
        raise CheckpointError(f"checkpoint {path}: {FILE} {problem}")
    return content


def _wrong(content: dict[str, Any]) -> Iterator[str]:
    """What is not of the form at the top of this module, in words."""
    for key in ("step", "world_size"):
        if not files.is_count(content.get(key)):
            yield f"says {key} {content.get(key)!r:.80}, which is no whole number"
    if not (isinstance(content.get("layout"), str) and isinstance(content.get("frozen", "saved"), str)):
        yield "says a layout, or what became of frozen parameters, that is no text"
    aliases = content.setdefault("aliases", {})
    if not (isinstance(aliases, dict) and all(isinstance(name, str) for name in aliases.values())):
        yield "has aliases that are not names"
    groups = content.get("param_groups")
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        yield "has no list of parameter groups"
    if not isinstance(content["parameters"], dict):
        yield "has no parameters by name"
        return
    for name, entry in content["parameters"].items():
        if (problem := _wrong_entry(entry)) is not None:
            yield f"says of {name!r:.200} {problem}"


def _wrong_entry(entry: Any) -> str | None:
    if not isinstance(entry, dict) or entry.get("kind") not in ("lorapre", "adamw", "untrained"):
        return f"no kind that is known: {entry!r:.80}"
    shape = entry.get("shape")
    if not (isinstance(shape, list) and all(files.is_count(n) for n in shape) and math.prod(shape) < 1 << 63):
        return f"a shape that is none: {shape!r:.80}"
    if entry["kind"] != "untrained" and not files.is_count(entry.get("step")):
        return f"a step that is no whole number: {entry.get('step')!r:.80}"
    if entry.get("weights", "kahan") != "kahan":
        return f"weights that are kept in no way that is known: {entry['weights']!r:.80}"
    if entry["kind"] != "lorapre":
        return None
    if len(shape) != 2:
        return f"factors of a tensor that is no matrix: {shape!r:.80}"
    for key in RANKS.values():
        rank = entry.get(key) if key == "rank" else entry.get(key, 1)
        if not (files.is_count(rank) and (rank or entry.get("optimizer") == "LoRAPreAdafactor")):
            return f"a {key} that is no rank: {rank!r:.80}"
    if not isinstance(entry.get("variant"), str) or not isinstance(entry.get("optimizer", "LoRAPre"), str):
        return "an optimizer or variant that is no text"
    known = (*SQUARES, *SQUARES.values())
    if not isinstance(entry.get("vectors", []), list) or any(v not in known for v in entry.get("vectors", [])):
        return f"statistics that are not known: {entry.get('vectors')!r:.80}"
    forms = entry.get("forms", {})
    if not isinstance(forms, dict) or any(m not in RANKS or form not in STATE_DTYPES for m, form in forms.items()):
        return f"factors in a form that is not known: {forms!r:.80}"
    return None


def trained(saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was trained."""
    return {name: entry for name, entry in saved["parameters"].items() if entry["kind"] != "untrained"}


def differences(
    saved: dict[str, Any],
    present: dict[str, dict[str, Any]],
    untrained: Container[str],
    groups: int,
    resize: bool,
) -> list[str]:
    """How the optimizer (``present``: :func:`parameters`, of all ranks) differs from what was saved, in words.

    What was frozen then and is trained now begins with fresh state; what is frozen now (``untrained``) needs none. With
    ``resize``, other ranks of the factors are no difference.
    """
    then = trained(saved)
    was, now = _kinds(then), _kinds(present)
    moved = {name for name in was.keys() & now.keys() if was[name] != now[name]}  # a stack has other names then
    fresh = {n: e for n, e in present.items() if n not in then and parameter_name(n) not in moved}
    stacks = {parameter_name(n) for n in fresh} & saved["parameters"].keys() - fresh.keys()
    found = [f"{n} was frozen, and a stack of matrices that was cannot go on as trained" for n in sorted(stacks)]
    found += weight_differences(saved, {n: e for n, e in fresh.items() if parameter_name(n) not in stacks})
    gone = [n for n in sorted(then.keys() - present.keys()) if n not in untrained and parameter_name(n) not in moved]
    found += [f"{name} is in it, but no trained parameter here" for name in gone]
    alike: dict[str, list[str]] = {}
    for name in sorted(moved):
        alike.setdefault(f"kind was {was[name]}, is {now[name]}", []).append(name)
    for name in sorted(then.keys() & present.keys()):
        if parameter_name(name) not in moved and (text := _difference(then[name], present[name], resize)):
            alike.setdefault(text, []).append(name)
    found += [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}" for text, names in alike.items()]
    if moved and (targets := _targets(then)):
        found.append(f"target_modules={json.dumps(targets)} selects what was low-rank in it")
    if len(saved["param_groups"]) != groups:
        found.append(f"it has {len(saved['param_groups'])} parameter groups, the optimizer {groups}")
    return found


def _kinds(parameters: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {parameter_name(name): entry["kind"] for name, entry in parameters.items()}


def _difference(then: dict[str, Any], present: dict[str, Any], resize: bool) -> str | None:
    """The first difference between a parameter's entries, in words."""
    roots = {square: root for root, square in SQUARES.items()}
    for key, now in present.items():
        was = then.get(key)
        if key == "optimizer":
            was = was or "LoRAPre"  # the first versions had but one, and did not say so
        elif key == "vectors":
            was = [roots.get(square, square) for square in vectors(then)]
        if key not in ("step", "forms", "weights") and was != now and not (resize and key in ("rank", "rank_v")):
            hint = " (resize_rank=True, or a program's --resize_rank, adapts it)" if key in ("rank", "rank_v") else ""
            return f"{key} was {was}, is {now}{hint}"
    return None


def _targets(then: dict[str, dict[str, Any]]) -> list[str] | None:
    """``target_modules`` that select what was low-rank in a checkpoint, if a few names do."""
    low_rank = {name: entry for name, entry in then.items() if entry["kind"] == "lorapre"}
    if len({ranks(entry) for entry in low_rank.values()}) != 1:
        return None
    rank, rank_v = ranks(next(iter(low_rank.values())))
    targets = set()
    for name in low_rank:
        inside, numbered = in_block(parameter_name(name).split("."))
        targets.add(".".join(inside[2 if numbered else 0 :]).removesuffix(".weight"))
    listed = sorted(targets)
    right = all((n in low_rank) == is_low_rank(n, e["shape"], rank, rank_v or 1, listed) for n, e in then.items())
    return listed if right and len(listed) <= 40 else None


def unusable_groups(saved: dict[str, Any], optimizer: LowRankOptimizer) -> list[str]:
    """Options of saved parameter groups that the optimizer cannot take, in words."""
    found = []
    for k, (present, options) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=False)):
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


def weight_differences(saved: dict[str, Any], present: dict[str, dict[str, Any]]) -> list[str]:
    """As :func:`differences`, for the weights alone."""
    found = []
    for name, entry in present.items():
        then = saved["parameters"].get(name)
        if then is None:
            found.append(f"{name} is not in it")
        elif then["shape"] != entry["shape"]:
            found.append(f"{name}: shape was {then['shape']}, is {entry['shape']}")
    return found


def missing(saved: dict[str, Any], untrained: dict[str, Any]) -> list[str]:
    """Tensors beside the optimizer's that are not in the checkpoint as they are here."""
    found = []
    for name, tensor in untrained.items():
        entry = saved["parameters"].get(name)
        if entry is None:
            found.append(f"{name} is not in it")
        elif entry["shape"] != list(tensor.shape):
            found.append(f"{name}: shape was {entry['shape']}, is {list(tensor.shape)}")
    return found


def compensated(entry: dict[str, Any]) -> bool:
    """Whether the bits are there that a parameter's 16-bit weights lack."""
    return entry.get("weights") == "kahan"


def ranks(entry: dict[str, Any]) -> tuple[Any, Any]:
    """Ranks of the factors of a parameter, ``(None, None)`` where it has none."""
    return entry.get("rank"), entry.get("rank_v")


def forms(entry: dict[str, Any]) -> dict[str, str]:
    """In which form a parameter's factors were saved, by moment; fp32 where it is not said."""
    return dict(entry.get("forms", {}))


def vectors(entry: dict[str, Any]) -> list[str]:
    """Names of the statistics of a parameter with factors, as they were saved; the first versions did not say them."""
    return list(entry.get("vectors", ["v_row"] if entry["variant"] == "stable" else []))


def complain(path: Path, found: list[str]) -> None:
    """Raise a CheckpointError that lists the differences, if there are any."""
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise CheckpointError(f"checkpoint {path} does not fit: " + "; ".join(found[:8]) + more)
