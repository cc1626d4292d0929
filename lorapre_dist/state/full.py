"""The whole state on rank 0, and from there into any layout: one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import ConfigError
from ..core import codes
from ..core.comm import all_ranks
from ..core.factors import SQUARES
from ..core.quantized import converted
from ..core.rounding import COMPENSATION
from ..core.spec import CODES, SCALES
from .shards import OPTIMIZER, Shard, bring_home, in_other_form, state_shards, vector_dim

#: State with something for each element of the parameter: whole, it has the parameter's shape.
ELEMENTWISE = ("exp_avg", "exp_avg_sq", *CODES, COMPENSATION)


def full_state(held: list[tuple[Any, Any]], group: Any = None) -> dict[str, dict[str, Any]]:
    """The state of all ranks' ``(piece, state)`` pairs in host memory of rank 0, ``{}`` elsewhere; a collective.

    By parameter name: the tensors, ``exp_avg`` and ``exp_avg_sq`` in the parameter's shape, ``compensation`` in that
    and two bytes, and ``step``.
    """
    mine = {piece.name: (piece.shape, state.step) for piece, state in held}
    known = {name: entry for part in all_ranks(mine, group) for name, entry in part.items()}
    full: dict[str, dict[str, Any]] = {}
    for key, tensor in gather(state_shards(held), group):
        name, part = key.removeprefix(OPTIMIZER).rsplit(".", 1)
        if tensor is not None:
            shape, step = known[name]
            entry = full.setdefault(name, {"step": step})
            entry[part] = tensor.view((*shape, *tensor.shape[1:])) if part in ELEMENTWISE else tensor
    return full


def load_full_state(full: dict[str, dict[str, Any]], held: list[tuple[Any, Any]], group: Any = None) -> None:
    """Spread what :func:`full_state` gave on rank 0 over all ranks' ``(piece, state)`` pairs; a collective.

    Raises:
        ConfigError: on every rank: names or shapes that differ. Nothing has been changed then.
    """
    tensors, steps = {}, {name: entry.get("step", 0) for name, entry in full.items()}
    mine = [piece.name for piece, state in held if SCALES.keys() <= state.tensors().keys()]
    coded = {name for names in all_ranks(mine, group) for name in names}
    for name, entry in {name: recoded(rooted(entry), name in coded) for name, entry in full.items()}.items():
        for part, tensor in entry.items():
            if part != "step":
                each = tensor.shape[-1:] if part == COMPENSATION else ()
                tensors[f"{OPTIMIZER}{name}.{part}"] = tensor.reshape((-1, *each)) if part in ELEMENTWISE else tensor
    shards, fresh = _compensated_alike(state_shards(held), tensors, group)
    scatter(shards, tensors, group)
    for shard in fresh.values():
        shard.local.zero_()
    bring_home(shards | fresh)
    steps = all_ranks(steps, group)[0]
    for piece, state in held:
        state.step = steps[piece.name]


def _compensated_alike(
    shards: dict[str, Shard], tensors: dict[str, Tensor], group: Any
) -> tuple[dict[str, Shard], dict[str, Shard]]:
    """The shards to fill from rank 0's ``tensors``, and those to begin with zeros; a collective.

    What 16-bit weights lack may be kept on one side alone: here it begins with zeros then, there it is dropped from
    ``tensors``.
    """
    here = {name for names in all_ranks([n for n in shards if n.endswith(COMPENSATION)], group) for name in names}
    there = all_ranks([n for n in tensors if n.endswith(COMPENSATION)], group)[0]
    begins, dropped = here - set(there), set(there) - here
    said(len(begins), len(dropped))
    for name in dropped:
        tensors.pop(name, None)
    known = {name: shard for name, shard in shards.items() if name not in begins}
    return known, {name: shard for name, shard in shards.items() if name in begins}


def said(fresh: int, dropped: int) -> None:
    """Warn, on rank 0, that ``compensation`` was not saved for so many parameters, or is not kept here for so many."""
    if _rank(None):
        return
    if fresh:
        warnings.warn(f"{fresh} parameters begin without compensation: it was not saved", stacklevel=3)
    if dropped:
        text = "is not kept here (weights='kahan' would): their weights are as rounded to 16 bits"
        warnings.warn(f"the compensation of {dropped} parameters {text}", stacklevel=3)


def rooted(entry: dict[str, Any]) -> dict[str, Any]:
    """A matrix's state, with roots of the mean squares that earlier versions saved."""
    roots = {square: root for root, square in SQUARES.items()}
    return {roots.get(key, key): value.sqrt() if key in roots else value for key, value in entry.items()}


def recoded(entry: dict[str, Any], coded: bool) -> dict[str, Any]:
    """A parameter's state, whole, with AdamW's moments in 8 bits or not, as they are kept here; itself if it is so."""
    found, parts = dict(entry), {*SCALES, *CODES, "exp_avg", "exp_avg_sq"}
    if coded == (SCALES.keys() <= entry.keys()) or any(type(entry[key]) is not Tensor for key in parts & entry.keys()):
        return entry
    for scale, key in SCALES.items():
        moment = scale.removesuffix("_row")
        if coded and moment in entry:
            wide = found.pop(moment)
            found[scale] = wide.abs().amax(1)
            found[key] = codes.encoded(wide, found[scale][:, None], getattr(torch, CODES[key]))
        elif not coded and key in entry:
            found[moment] = codes.decoded(found.pop(key), found.pop(scale)[:, None])
    return found


def gather(shards: dict[str, Shard], group: Any = None) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor by name, whole, in host memory of rank 0, and None elsewhere; a collective over ``group``."""
    for name, holders in _holders(shards, group).items():
        first = next(iter(holders.values()))
        whole = torch.empty(first.shape, dtype=first.local.dtype) if _rank(group) == 0 else None
        covered: set[tuple[int, int]] = set()
        for rank, theirs in sorted(holders.items()):
            run = theirs.start + theirs.skip, theirs.owned.shape[theirs.dim]
            if run[1] <= 0 or run in covered:  # empty, or a replica of what a lower rank has
                continue
            covered.add(run)
            part = shards[name].owned if rank == _rank(group) else None
            part = _move(part, rank, 0, theirs.owned, group)
            if whole is not None and part is not None:
                whole.narrow(theirs.dim, *run).copy_(part)
        yield name, whole


def scatter(shards: dict[str, Shard], whole: dict[str, Tensor], group: Any = None) -> None:
    """Fill every rank's shards from rank 0's whole tensors (``whole`` counts there alone); a collective.

    Raises:
        ConfigError: on every rank: names or shapes that differ. Nothing has been changed then.
    """
    found = _holders(shards, group)
    whole = {name: _in_form(name, tensor, found.get(name)) for name, tensor in whole.items()}
    problems = _differences({n: next(iter(h.values())).shape for n, h in found.items()}, whole)
    problems = all_ranks(problems if _rank(group) == 0 else None, group)[0]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError("the full state does not fit: " + "; ".join(problems[:3]) + more)
    for name, holders in found.items():
        for rank, theirs in sorted(holders.items()):
            length = theirs.local.shape[theirs.dim]
            if not length:
                continue
            source = whole[name].narrow(theirs.dim, theirs.start, length) if _rank(group) == 0 else None
            source = source.to(theirs.local.dtype) if source is not None else None
            part = _move(source, 0, rank, theirs.local, group)
            if part is not None:
                shards[name].local.copy_(part)


def _in_form(name: str, tensor: Tensor, holders: dict[int, Shard] | None) -> Tensor:
    """A factor as its holders keep it; anything else as it is."""
    if not holders:
        return tensor
    first = next(iter(holders.values()))
    like = torch.empty(0, dtype=first.local.dtype)
    if not in_other_form(name, tensor.dtype, like) or tensor.ndim != 2:
        return tensor
    return converted(tensor, like, vector_dim(first.dim))


def _differences(wanted: dict[str, tuple[int, ...]], given: dict[str, Tensor]) -> list[str]:
    found = [f"{name} is missing" for name in sorted(wanted.keys() - given.keys())]
    found += [f"{name} is no state of this optimizer" for name in sorted(given.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & given.keys()):
        if tuple(given[name].shape) != wanted[name]:
            found.append(f"{name} is of shape {tuple(given[name].shape)}, not {wanted[name]}")
        elif not given[name].isfinite().all():
            found.append(f"{name} is not finite")
    return found


def _holders(shards: dict[str, Shard], group: Any) -> dict[str, dict[int, Shard]]:
    """Every rank's shard of each tensor, without elements, tensors in an order that is the same on every rank."""
    mine = {name: replace(shard, local=shard.local.to("meta"), home=None) for name, shard in shards.items()}
    found: dict[str, dict[int, Shard]] = {}
    for rank, theirs in enumerate(all_ranks(mine, group)):
        for name, shard in theirs.items():
            found.setdefault(name, {})[rank] = shard
    return dict(sorted(found.items()))


def _move(part: Tensor | None, source: int, target: int, like: Tensor, group: Any) -> Tensor | None:
    """``part`` of rank ``source``, of the form of ``like``, on rank ``target``; None elsewhere."""
    rank = _rank(group)
    if source == target:
        return part if rank == source else None
    device = torch.device("cpu")
    if "nccl" in dist.get_backend(group):
        device = torch.device("cuda", torch.cuda.current_device())
    world: Any = group or dist.group.WORLD
    if rank == source and part is not None:
        dist.send(part.to(device).contiguous(), dist.get_global_rank(world, target), group=group)
    if rank != target:
        return None
    received = torch.empty(like.shape, dtype=like.dtype, device=device)
    dist.recv(received, dist.get_global_rank(world, source), group=group)
    return received


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank(group: Any) -> int:
    return dist.get_rank(group) if _active() else 0
