"""DistributedDataParallel: every rank has all weights and gradients, so the state can be dealt out among them.

A matrix is stepped by one rank, a vector by each rank in part; then each sends its results to all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from .base import Layout, Piece, Send, Unit
from .geometry.dealt import dealt
from .matrices import LowRank

Named = Iterable[tuple[str, torch.Tensor, int]]


def layout(named: Named, group: Any, is_low_rank: LowRank) -> Layout:
    """Matrices to ranks, balanced by elements (hence by time), largest first; others in equal parts of dim 0."""
    named, size, rank = list(named), dist.get_world_size(group), dist.get_rank(group)
    groups, shapes = {name: index for name, _, index in named}, [(name, tuple(p.shape)) for name, p, _ in named]
    made = Layout("DDP, sharded state", world_size=size, group=group, spread_over=[group])
    parts = dealt(shapes, size, lambda name, shape: is_low_rank(name, shape, groups[name]))
    for (name, p, index), some in zip(named, parts, strict=True):
        unit = Unit(p, index, [])
        for part in some:
            made.sends.append(Send(part.owner, p, part.start, part.stop))
            # A matrix of a stack is whole, under its own name.
            start = part.start if part.name == name else 0
            stop = start + part.stop - part.start
            unit.pieces.append(Piece(part.name, part.shape, start, stop, part.start, owned=part.owner == rank))
        made.units.append(unit)
    return made
