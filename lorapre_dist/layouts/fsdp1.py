"""FSDP1 with ``use_orig_params=True``: flat parameters cut into equal parts, seen through views of one's own part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..core.comm import all_ranks
from .base import Layout, Piece, SubGroups, Unit

Named = Iterable[tuple[str, torch.Tensor, int]]


def layout(named: Named, handles: list[Any]) -> Layout:
    """A layout of parameters that ``FlatParamHandle``s hold, and whole ones; a collective.

    Args:
        handles: of all wrapped modules, in any order.
    """
    named = list(named)
    placed = {id(p): (h, k) for h in handles for k, p in enumerate(h.flat_param._params or ())}
    mine = {n: _interval(*placed[id(p)]) for n, p, _ in named if id(p) in placed}
    made = Layout("FSDP1")
    everyone: dict[int, list[dict[str, tuple[int, int]]]] = {}
    subgroups: dict[int, SubGroups] = {}
    for name, p, index in named:
        if id(p) not in placed:
            made.units.append(Unit(p, index, [Piece(name, tuple(p.shape), 0, p.numel(), 0)]))
            continue
        handle, k = placed[id(p)]
        group = handle.process_group
        if id(group) not in everyone:
            everyone[id(group)], subgroups[id(group)] = all_ranks(mine, group), SubGroups(group)
        shape = tuple(handle.flat_param._shapes[k])
        peers = subgroups[id(group)].peers([theirs[name] for theirs in everyone[id(group)]])
        start, stop = mine[name]
        made.world_size = max(made.world_size, dist.get_world_size(group))
        made.units.append(Unit(p, index, [Piece(name, shape, start, stop, 0, peers, owned=start < stop)]))
        made.known[subgroups[id(group)].ranks] = group
    made.spread_over = [group for ranks, group in made.known.items() if len(ranks) > 1]
    return made


def shapes(names: Mapping[int, str], handles: Iterable[Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of whole parameters, which show a part of themselves; ``names`` by the id of each."""
    found = [(p, h.flat_param._shapes[k]) for h in handles for k, p in enumerate(h.flat_param._params or ())]
    return {names[id(p)]: tuple(shape) for p, shape in found if id(p) in names}


def _interval(handle: Any, k: int) -> tuple[int, int]:
    """The elements of parameter ``k`` of a flat parameter that this rank holds."""
    if not handle.uses_sharded_strategy:
        return 0, torch.Size(handle.flat_param._shapes[k]).numel()
    info = handle.flat_param._shard_param_infos[k]
    return (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
