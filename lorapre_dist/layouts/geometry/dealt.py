"""Whole matrices dealt out to ranks, vectors in equal parts: state under DDP, where all ranks have all gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ...core.interval import Range
from .ranges import expert_name, owners
from .rows import slices
from .shares import Arrangement, IsLowRank, Named, Share, replicated


class Dealt(NamedTuple):
    """What one rank steps of a parameter: elements ``[start, stop)`` of it; a matrix of a stack under its own name.

    A tuple, for there are as many as parameters times ranks.
    """

    owner: int
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


def dealt(named: Named, ranks: int, is_low_rank: IsLowRank) -> Iterator[list[Dealt]]:
    """Of each parameter who steps what: matrices balanced by elements (hence by time), others in parts of dim 0."""
    matrices = {name: _matrices(name, shape) for name, shape in named if is_low_rank(name, shape)}
    owner = owners({name: math.prod(sides) for some in matrices.values() for name, sides in some}, ranks)
    for name, shape in named:
        if name in matrices:
            size = math.prod(shape) // max(1, len(matrices[name]))
            parts = [(k * size, (k + 1) * size) for k in range(len(matrices[name]))]
            yield [Dealt(owner[n], n, s, *part) for (n, s), part in zip(matrices[name], parts, strict=True)]
        else:
            yield [Dealt(k, name, shape, *part) for k, part in zip(*_parts(shape, ranks), strict=True)]


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
            held, ranges = _parts(shape, ranks)
            shares.append(Share(name, shape, held, ranges, pieces=len(parts)))
    return Arrangement(ranks, tuple(shares), steps=tuple(steps))


@functools.lru_cache(maxsize=64)
def _parts(shape: tuple[int, ...], ranks: int) -> tuple[tuple[int, ...], tuple[Range, ...]]:
    """Who has something of a parameter that is cut along dim 0, and which elements; a model has few shapes."""
    some = [(k, part) for k, part in enumerate(slices(shape, ranks)) if part[0] < part[1]]
    return tuple(k for k, _ in some), tuple(part for _, part in some)


def _matrices(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and sides of the matrices in a low-rank parameter: itself, or those of a stack."""
    return [(name, shape)] if len(shape) == 2 else [(expert_name(name, e), shape[1:]) for e in range(shape[0])]
