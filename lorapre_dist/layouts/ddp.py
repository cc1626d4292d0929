"""DistributedDataParallel: every rank has all weights and gradients, so the state can be dealt out among them.

A matrix is stepped by one rank, a vector by each rank in part; then each sends its results to all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from .base import Layout, Piece, Send, Unit
from .matrices import LowRank
from .ranges import equal_ranges, expert_name, owners

Named = Iterable[tuple[str, torch.Tensor, int]]


def layout(named: Named, group: Any, is_low_rank: LowRank) -> Layout:
    """Matrices to ranks, balanced by elements (hence by time), largest first; others in equal parts of dim 0."""
    named, size, rank = list(named), dist.get_world_size(group), dist.get_rank(group)
    matrices = {n: _matrices(n, tuple(p.shape)) for n, p, i in named if is_low_rank(n, tuple(p.shape), i)}
    owner = owners({name: math.prod(sides) for found in matrices.values() for name, sides in found}, size)
    made = Layout("DDP, sharded state", world_size=size, group=group, spread_over=[group])
    for name, p, index in named:
        shape, unit = tuple(p.shape), Unit(p, index, [])
        rows = [(a * p.shape[1:].numel(), b * p.shape[1:].numel()) for a, b in equal_ranges((*shape, 1)[0], size)]
        for k, (matrix, sides) in enumerate(matrices.get(name, ())):
            numel = math.prod(sides)
            unit.pieces.append(Piece(matrix, sides, 0, numel, k * numel, owned=owner[matrix] == rank))
            made.sends.append(Send(owner[matrix], p, k * numel, (k + 1) * numel))
        for k, (start, stop) in enumerate(() if name in matrices else rows):
            if start < stop:
                unit.pieces.append(Piece(name, shape, start, stop, start, owned=k == rank))
                made.sends.append(Send(k, p, start, stop))
        made.units.append(unit)
    return made


def _matrices(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and sides of the matrices in a low-rank parameter: itself, or those of a stack."""
    return [(name, shape)] if len(shape) == 2 else [(expert_name(name, e), shape[1:]) for e in range(shape[0])]
