"""Models over more axes than one: layers dealt out to the stages of a pipeline, split parameters cut again."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...core.interval import Range
from .ranges import equal_ranges
from .shares import Arrangement, Named, Share

#: Ranks, where they lie and, where rows are split, the columns of these: one for each rank.
_Held = tuple[int, Range, Range | None]
#: Of a parameter's name and shape the dimension along which it is split; None: it is not.
DimOf = Callable[[str, tuple[int, ...]], int | None]


@dataclass(frozen=True)
class Split:
    """What a rank has of a parameter: ``[start, stop)`` of dimension ``dim`` of a tensor of ``shape``."""

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of what it has."""
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    def of_whole(self, start: int, stop: int) -> tuple[Range, Range | None]:
        """``[start, stop)`` of the part as an interval of the whole parameter, and of a part of columns these."""
        if self.dim == 0:
            ahead = self.start * math.prod(self.shape[1:])
            return (start + ahead, stop + ahead), None
        if self.start == self.stop:  # no columns of all rows, as a DTensor has them on ranks for which there are none
            return (0, math.prod(self.shape)), (self.start, self.stop)
        return (self._place(start), self._place(stop)), (self.start, self.stop)

    def _place(self, at: int) -> int:
        row, col = divmod(at, max(1, self.stop - self.start))
        return row * self.shape[1] + (self.start + col if col else 0)


def parts_of(shape: tuple[int, ...], dim: int, parts: int) -> list[Split]:
    """A parameter split along a dimension, as ``torch.chunk`` does."""
    return [Split(shape, dim, start, stop) for start, stop in equal_ranges(shape[dim], parts)]


def local(named: Named, parts: int, dim_of: DimOf) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The parameters as each of so many tensor-parallel ranks has them."""
    return [_local(named, _splits(named, parts, dim_of), t) for t in range(parts)]


def _splits(named: Named, parts: int, dim_of: DimOf) -> dict[str, list[Split]]:
    dims = {name: dim_of(name, shape) for name, shape in named}
    return {name: parts_of(shape, dim, parts) for name, shape in named if (dim := dims[name]) is not None}


def _local(named: Named, splits: dict[str, list[Split]], t: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, splits[name][t].part if name in splits else shape) for name, shape in named]


def cut_again(named: Named, parts: int, dim_of: DimOf, inner: Callable[[Named], Arrangement]) -> Arrangement:
    """Tensor parallelism within data parallelism: rank ``d * parts + t`` is the ``d``-th that has part ``t``.

    Args:
        dim_of: what is split, and how; each part has all of the rest.
        inner: spreads the parameters of one part over the ranks that have it.
    """
    if parts == 1:
        return inner(named)
    splits = _splits(named, parts, dim_of)
    each = [inner(_local(named, splits, t)) for t in range(parts)]
    by_name = [{share.name: share for share in one.shares} for one in each]
    shares = list[Share]()
    for first in each[0].shares:
        alike = [theirs[first.name] for theirs in by_name]
        if first.name in splits:
            shares.append(_joined(alike, splits[first.name]))
            continue
        copies = [tuple(d * parts + t for d in share.ranks) for t, share in enumerate(alike)]
        if any(share.shared for share in alike):
            shares += [replace(share, ranks=ranks) for share, ranks in zip(alike, copies, strict=True)]
        else:
            shares.append(replace(first, ranks=sorted(itertools.chain.from_iterable(copies))))
    partition = tuple(one for of in zip(*(one.partition for one in each), strict=True) for one in of)
    most = max(one.call_elements for one in each)
    return replace(each[0], size=parts * each[0].size, shares=tuple(shares), partition=partition, call_elements=most)


def _joined(each: Sequence[Share], splits: Sequence[Split]) -> Share:
    """The whole parameter of which there is a share for each part."""
    held = list[_Held]()
    for t, (share, split) in enumerate(zip(each, splits, strict=True)):
        held += [(d * len(each) + t, *split.of_whole(*part)) for d, part in zip(share.ranks, share.ranges, strict=True)]
    held.sort(key=lambda one: one[0])
    columns = tuple(some for _, _, some in held if some is not None) or None
    ranks, ranges = tuple(rank for rank, _, _ in held), tuple(part for _, part, _ in held)
    return replace(each[0], shape=splits[0].shape, ranks=ranks, ranges=ranges, columns=columns, turn=0)


def side_by_side(first: Arrangement, second: Arrangement, order: Sequence[str]) -> Arrangement:
    """Two arrangements of some parameters each over the same ranks, stepped in ``order``."""
    place = {name: k for k, name in enumerate(order)}
    shares = sorted((*first.shares, *second.shares), key=lambda share: place[share.name])
    partition = tuple(a + b for a, b in zip(first.partition, second.partition, strict=True))
    return replace(
        first, shares=tuple(shares), partition=partition, call_elements=first.call_elements + second.call_elements
    )


def stages(named: Named, count: int) -> list[list[str]]:
    """The parameters of each stage of a pipeline, of which every layer has one: blocks, and what is between them.

    Layers are dealt out so that stages have about the same number of elements, as DeepSpeed's ``PipelineModule`` does
    by default.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    layers: dict[str, list[tuple[str, int]]] = {}
    for name, shape in named:
        block = re.match(r".*?\.\d+(?=\.)", name)
        layer = block.group() if block else name.rpartition(".")[0]
        layers.setdefault(layer, []).append((name, math.prod(shape)))
    if len(layers) < count:
        raise ValueError(f"{len(layers)} layers are fewer than {count} stages")
    bounds = balanced([sum(numel for _, numel in layer) for layer in layers.values()], count)
    every = list(layers.values())
    return [[name for layer in every[low:high] for name, _ in layer] for low, high in itertools.pairwise(bounds)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Where the parts of a row of weights begin, and its end: DeepSpeed's ``partition_balanced``.

    Of all divisions one whose largest and smallest part differ least, as far as a part at a time can tell.
    """
    n = len(weights)
    if n <= parts:
        return [min(k, n) for k in range(parts + 1)]
    sums = list(itertools.accumulate(weights, initial=0))
    infinite = math.inf
    # By how many parts so far: of the first i weights the largest and smallest part, and where the last one begins.
    row: list[tuple[float, float]] = [(0, infinite)] + [(infinite, infinite)] * n
    begins = list[list[int]]()
    for j in range(1, parts + 1):
        found: list[tuple[float, float]] = [(infinite, infinite)] * (n + 1)
        at = [0] * (n + 1)
        for i in range(j, n + 1):
            best = infinite
            for k in range(j - 1, i):
                largest, smallest = max(row[k][0], sums[i] - sums[k]), min(row[k][1], sums[i] - sums[k])
                if largest - smallest <= best:
                    best, found[i], at[i] = largest - smallest, (largest, smallest), k
        row = found
        begins.append(at)
    bounds = [n]
    for at in reversed(begins):
        bounds.append(at[bounds[-1]])
    return bounds[::-1]
