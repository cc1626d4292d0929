"""Whole matrices dealt out to ranks, vectors in equal parts: state under DDP, where all ranks have all gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...core.interval import Range
from .ranges import expert_name, owners
from .rows import slices
from .shares import Arrangement, IsLowRank, Named, Share, replicated


@dataclass(frozen=True)
class Dealt:
    """What one rank steps of a parameter: elements ``[start, stop)`` of it; a matrix of a stack under its own name."""

    owner: int
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


def dealt(named: Named, ranks: int, is_low_rank: IsLowRank) -> list[list[Dealt]]:
    """Of each parameter who steps what: matrices balanced by elements (hence by time), others in parts of dim 0."""
    matrices = {name: _matrices(name, shape) for name, shape in named if is_low_rank(name, shape)}
    owner = owners({name: math.prod(sides) for some in matrices.values() for name, sides in some}, ranks)
    found = []
    for name, shape in named:
        if name in matrices:
            size = math.prod(shape) // max(1, len(matrices[name]))
            parts = [(k * size, (k + 1) * size) for k in range(len(matrices[name]))]
            found.append([Dealt(owner[n], n, s, *part) for (n, s), part in zip(matrices[name], parts, strict=True)])
        else:
            some = enumerate(slices(shape, ranks))
            found.append([Dealt(k, name, shape, *part) for k, part in some if part[0] < part[1]])
    return found


def ddp(named: Named, ranks: int, is_low_rank: IsLowRank) -> Arrangement:
    """The state dealt out so; each rank sends what it has stepped to all others."""
    if ranks == 1:
        return replicated(named)
    shares, steps = [], [0] * ranks
    for (name, shape), parts in zip(named, dealt(named, ranks, is_low_rank), strict=True):
        for part in parts:
            steps[part.owner] += part.stop - part.start
        if is_low_rank(name, shape):
            shares += [Share(p.name, p.shape, (p.owner,), ((0, math.prod(p.shape)),)) for p in parts]
        else:
            held: list[Range] = [(p.start, p.stop) for p in parts]
            shares.append(Share(name, shape, tuple(p.owner for p in parts), tuple(held), pieces=len(parts)))
    return Arrangement(ranks, tuple(shares), steps=tuple(steps))


def _matrices(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and sides of the matrices in a low-rank parameter: itself, or those of a stack."""
    return [(name, shape)] if len(shape) == 2 else [(expert_name(name, e), shape[1:]) for e in range(shape[0])]
