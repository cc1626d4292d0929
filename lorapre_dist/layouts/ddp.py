"""DistributedDataParallel: every rank has all weights and gradients, so the state can be dealt out among them.

A matrix is stepped by one rank, a vector by each rank in part; then each sends its results to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from ..core.interval import equal_ranges
from .base import Layout, Piece, Send, Unit

Named = Iterable[tuple[str, torch.Tensor, int]]


def layout(named: Named, group: Any, is_low_rank: Callable[[str, tuple[int, ...], int], bool]) -> Layout:
    """Matrices to ranks, balanced by elements (hence by time), largest first; other parameters in equal parts.

    Args:
        is_low_rank: of name, shape and index of the parameter group.
    """
    named, size, rank = list(named), dist.get_world_size(group), dist.get_rank(group)
    matrices = [(n, p) for n, p, i in named if is_low_rank(n, tuple(p.shape), i)]
    owner, load = {}, [0] * size
    for name, p in sorted(matrices, key=lambda pair: -pair[1].numel()):
        owner[name] = load.index(min(load))
        load[owner[name]] += p.numel()
    made = Layout("DDP, sharded state", world_size=size, group=group)
    for name, p, index in named:
        shape, unit = tuple(p.shape), Unit(p, index, [])
        ranges = equal_ranges(p.numel(), size)
        if name in owner:
            ranges = tuple((0, p.numel() if k == owner[name] else 0) for k in range(size))
        for k, (start, stop) in enumerate(ranges):
            if start < stop:
                unit.pieces.append(Piece(name, shape, start, stop, start, owned=k == rank))
                made.sends.append(Send(k, p, start, stop))
        made.units.append(unit)
    return made
