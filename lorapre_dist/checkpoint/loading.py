"""Load a checkpoint of any layout into an optimizer of any other: weights, state and the groups' options."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.param_groups import parameter_name
from ..core.factors import SQUARES
from ..core.rounding import COMPENSATION
from ..optimizers.base import LowRankOptimizer
from ..state.shards import (
    MODEL,
    OPTIMIZER,
    UNTRAINED,
    Shard,
    Untrained,
    bring_home,
    in_other_form,
    state_shards,
    weight_shards,
)
from ..state.state_dict import restore_groups, tell_converted
from . import content, dcp, fit, halves, moments, stored
from .content import Content
from .entries import LowRank, Trained
from .resize import load_resized
from .run import keyed, read_extra, usable
from .team import Team


def load(
    path: str | Path,
    optimizer: LowRankOptimizer,
    *,
    untrained: dict[str, Untrained] | None = None,
    states: bool = True,
    resize_rank: bool = False,
    intact: bool = False,
    check: Callable[[dict[str, Any]], None] | None = None,
    group: Any = None,
) -> dict[str, Any]:
    """Load a checkpoint of any layout and world size; a collective. Returns what was saved as ``extra``.

    Args:
        untrained: tensors to fill beside those of the optimizer, by name.
        states: False to load weights alone.
        resize_rank: adapt factors of another rank (:func:`lorapre_dist.checkpoint.resize.resize`).
        intact: it has been verified already.
        check: called with ``extra`` before anything is loaded; what it raises ends the load.

    Raises:
        CheckpointError: it is damaged, or does not fit: everything that differs. Nothing has been loaded then.
    """
    path, team = Path(path), Team(group)
    if not intact:
        usable(path, group=group)
    with team.together(f"loading checkpoint {path}"):
        saved = content.read(path)
        extra = read_extra(path)
    if check is not None:
        check(extra)
    present, untrained = _fitting(path, saved, optimizer, untrained or {}, states, resize_rank, team)
    to = _target(path, saved, present, untrained, optimizer, states, team)
    with team.together(f"loading checkpoint {path}"):
        dcp.load(path / content.TENSORS, {to.lies.get(name, name): s for name, s in to.shards.items()}, group)
    for name in to.roots:
        to.shards[name].local.sqrt_()
    bring_home(to.shards)
    halves.load(path / content.TENSORS, to.change, to.shards, to.lower, group)
    if states:
        moments.load(path / content.TENSORS, to.recoded, to.factors, group)
        _finish(path, saved, to, optimizer, resize_rank, team)
    return extra


def _fitting(
    path: Path,
    saved: Content,
    optimizer: LowRankOptimizer,
    untrained: dict[str, Untrained],
    states: bool,
    resize_rank: bool,
    team: Team,
) -> tuple[dict[str, Trained], dict[str, Untrained]]:
    """What the optimizer holds, and the tensors to fill beside it; nothing has been loaded yet.

    Raises:
        CheckpointError: what was saved does not fit it, or is not whole.
    """
    present, was = _present(optimizer, team), saved.trained
    if states and was.keys() != present.keys():  # as torch.optim keeps the state of what is frozen now
        optimizer.bind_saved({parameter_name(name) for name in was})
        present = _present(optimizer, team)
        untrained = {n: t for n, t in untrained.items() if n not in {parameter_name(name) for name in present}}
    with team.together(f"loading checkpoint {path}"):
        fit.complain(path, _differences(saved, present, untrained, optimizer, states, resize_rank))
        stored.complete(path, saved, slice(team.rank, None, team.size))
    return present, untrained


@dataclass
class _Target:
    """What a load fills.

    Attributes:
        shards: by name here; ``lies`` says which of them have another name in the checkpoint.
        roots: names of mean squares that were saved where their roots are kept now.
        held: the pieces whose state was saved, with it; ``factors``: that state's tensors by name.
        lower, change: the bits that 16-bit weights lack, and where only one side has them.
        changed: matrices whose factors have another rank; ``converted``: how many are kept in another form.
        recoded: where AdamW's moments are in 8 bits on one side alone.
    """

    shards: dict[str, Any]
    lies: dict[str, str]
    roots: dict[str, str]
    held: list[tuple[Any, Any]]
    factors: dict[str, Shard]
    lower: dict[str, Shard]
    change: halves.Change
    changed: dict[str, LowRank]
    converted: int
    recoded: moments.Change


def _target(
    path: Path,
    saved: Content,
    present: dict[str, Trained],
    untrained: dict[str, Untrained],
    optimizer: LowRankOptimizer,
    states: bool,
    team: Team,
) -> _Target:
    """Where a checkpoint's tensors go."""
    assert optimizer.layout is not None
    was = saved.trained
    shards = {**weight_shards(optimizer.layout.units), **keyed(untrained)}
    fresh = {name for name in present if name not in was}
    left = [name for name in untrained if name in was]
    # Where the weights lie of what was frozen and is trained now, and the other way round.
    lies = {MODEL + name: UNTRAINED + name for name in fresh} | {UNTRAINED + name: MODEL + name for name in left}
    if left and states and team.rank == 0:
        text = f"{len(left)} parameters were trained and are frozen now, and the optimizer does not have them: weights"
        warnings.warn(f"{text} are loaded, optimizer state is not ({', '.join(left[:3])}, ...)", stacklevel=3)
    held = [(bound.piece, bound.state) for bound in optimizer.bound() if bound.piece.name not in fresh]
    factors = state_shards(held)
    # What bf16 weights lack belongs to them, and is loaded with them even where no state is.
    change = halves.Change.between(was, present)
    lower = {name: factors.pop(name) for name in list(factors) if name.endswith(f".{COMPENSATION}")}
    lacking = {f"{OPTIMIZER}{name}.{COMPENSATION}" for name in change.here}
    shards.update({name: shard for name, shard in lower.items() if name not in lacking})
    if team.rank == 0:
        change.say()
    changed: dict[str, LowRank] = {}
    converted, recoded = 0, moments.Change.between(was, present)
    if states:
        both = _low_rank(was, present)
        changed = {name: now for name, (then, now) in both.items() if then.ranks != now.ranks}
        converted = sum(then.forms != now.forms for then, now in both.values())
        resized = {f"{OPTIMIZER}{name}.{m}_{f}" for name in changed for m in "mv" for f in "BA"} | recoded.names()
        if team.rank == 0:
            recoded.say()
        as_saved = _as_saved(factors, dcp.shapes(path / content.TENSORS)) if converted else factors
        shards.update({name: shard for name, shard in as_saved.items() if name not in resized})
    roots = {}
    if saved.format == 1:
        roots = {n: n.removesuffix(r) + s for n in shards for r, s in SQUARES.items() if n.endswith(f".{r}")}
    return _Target(shards, lies | roots, roots, held, factors, lower, change, changed, converted, recoded)


def _finish(
    path: Path, saved: Content, to: _Target, optimizer: LowRankOptimizer, resize_rank: bool, team: Team
) -> None:
    """Once the state is loaded: what was saved otherwise than it is kept, steps and options."""
    tell_converted(optimizer, to.converted)
    optimizer.state_written()
    if to.changed:
        options = {"init_std": optimizer.config.init_std, "seed": optimizer.config.seed}
        load_resized(path / content.TENSORS, to.changed, to.factors, options, team)
    if to.changed or saved.format == 1:
        optimizer.settle()
    was = saved.trained
    for piece, state in to.held:
        state.step = was[piece.name].step
    _restore_options(optimizer, saved, resize_rank)


def _low_rank(was: Mapping[str, Trained], present: Mapping[str, Trained]) -> dict[str, tuple[LowRank, LowRank]]:
    """What was saved of each matrix with factors, and what is kept of it."""
    found = {}
    for name, now in present.items():
        then = was.get(name)
        if isinstance(now, LowRank) and isinstance(then, LowRank):
            found[name] = then, now
    return found


def _as_saved(shards: dict[str, Shard], saved: dict[str, Any]) -> dict[str, Shard]:
    """Shards to load into, in the form in which each factor was saved."""
    found = {}
    for name, shard in shards.items():
        entry = saved.get(name)
        other = entry is not None and in_other_form(name, entry.properties.dtype, shard.local)
        found[name] = shard.saved_as(tuple(entry.size), entry.properties.dtype) if other and entry else shard
    return found


def _differences(
    saved: Content,
    present: dict[str, Trained],
    untrained: dict[str, Untrained],
    optimizer: LowRankOptimizer,
    states: bool,
    resize_rank: bool,
) -> list[str]:
    """All that does not fit, in words."""
    lacking = fit.shape_differences(saved, {name: tensor.shape for name, tensor in untrained.items()})
    if not states:
        return fit.shape_differences(saved, {name: entry.shape for name, entry in present.items()}) + lacking
    found = fit.differences(saved, present, untrained, len(optimizer.param_groups), resize_rank)
    return found + fit.unusable_groups(saved, optimizer) + lacking


def _restore_options(optimizer: LowRankOptimizer, saved: Content, resize_rank: bool) -> None:
    """Set the groups' options to the saved ones, but for the ranks where factors were adapted to the present ones."""
    kept = ("rank", "rank_v") if resize_rank else ()
    groups = [{k: v for k, v in g.items() if k not in kept} for g in saved.param_groups]
    restore_groups(optimizer.param_groups, groups)


def _present(optimizer: LowRankOptimizer, team: Team) -> dict[str, Trained]:
    """What the optimizers of all ranks hold, by parameter name; a collective."""
    found = {name: entry for part in team.gather(content.parameters(optimizer)) for name, entry in part.items()}
    return dict(sorted(found.items()))
