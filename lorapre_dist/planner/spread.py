"""Which elements of every parameter every rank holds, as arrays over ranks: what the layouts do, without the ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorapre_dist.core.interval import Range, column_block, cut_rows, equal_ranges, holders
from lorapre_dist.layouts.ddp import owners

from .request import Parameter, Request

Array = np.ndarray[Any, np.dtype[np.int64]]


class Intervals:
    """The row-major intervals of one parameter on the ranks that share it.

    Args:
        ranges: of each rank; empty ones too where it takes part with nothing.
        q: columns, of a matrix.
    """

    def __init__(self, ranges: Iterable[Range], q: int = 1) -> None:
        self.ranges, self.q = tuple(ranges), q

    def __len__(self) -> int:
        return len(self.ranges)

    @functools.cached_property
    def _bounds(self) -> Array:
        return np.array(self.ranges, np.int64).reshape(-1, 2).T

    @functools.cached_property
    def numel(self) -> Array:
        """Elements on each rank."""
        start, stop = self._bounds
        return stop - start

    @functools.cached_property
    def rows(self) -> Array:
        """Rows that each rank touches."""
        start, stop = self._bounds
        return np.where(stop > start, -(-stop // self.q) - start // self.q, 0)

    @functools.cached_property
    def columns(self) -> Array:
        """Columns of ``A`` on each rank; all of them are shared out."""
        blocks = [column_block(self.q, len(self), k) for k in range(len(self))]
        return np.array([stop - start for start, stop in blocks], np.int64)

    @functools.cached_property
    def cut(self) -> int:
        """Rows that more than one rank touches."""
        return len(cut_rows(self.ranges, self.q))


@dataclass(frozen=True)
class Share:
    """One parameter, and the ranks that share it.

    Attributes:
        ranks: of those, in order; under ZeRO-3 and FSDP2 all, also with nothing.
        held: the interval of each.
        call: in which of the optimizer's calls per step it is stepped (one for each sub-group of ZeRO-3).
    """

    parameter: Parameter
    low_rank: bool
    ranks: Array
    held: Intervals
    call: int = 0


@dataclass(frozen=True)
class Spread:
    """All parameters over the ranks.

    Attributes:
        ranks: how many of them differ; 1 where each rank holds the same.
        uniform: every rank takes part in every matrix, so that all of them send the same.
        shares: in the order in which they are stepped.
        partition: elements of master weights on each rank, padding included; 0 where there are no partitions.
        call_elements: of those, the largest share that one call of the optimizer steps.
    """

    ranks: int
    uniform: bool
    shares: tuple[Share, ...]
    partition: Array = field(default_factory=lambda: np.zeros(1, np.int64))
    call_elements: int = 0

    def total(self, share: Share, values: Any) -> Array:
        """``values``, one for each of the share's ranks, as an array over all ranks."""
        found = np.zeros(self.ranks, np.int64)
        found[share.ranks] = values
        return found


def spread(request: Request) -> Spread:
    """The layout that the request asks for."""
    make = {"zero1": _zero12, "zero2": _zero12, "zero3": _zero3, "fsdp2": _fsdp2, "ddp": _ddp}
    return make.get(request.layout, replicated)(request)


def replicated(request: Request) -> Spread:
    """Every rank holds, and steps, all (ZeRO-0)."""
    everyone = np.arange(1)
    shares = [
        Share(p, request.is_low_rank(p), everyone, Intervals([(0, p.numel)], p.columns)) for p in request.parameters
    ]
    return Spread(1, False, tuple(shares))


def _zero12(request: Request) -> Spread:
    """DeepSpeed's one flat buffer, padded to 2 N elements and cut into N parts (``stage_1_and_2.py``)."""
    size = request.world_size
    ordered = list(request.parameters)
    if request.zero.round_robin_gradients:
        ordered = [p for _, p in sorted(enumerate(ordered), key=lambda pair: pair[0] % size)]
    align = 16 // request.width if request.zero.parameter_alignment else 1
    offsets, end = [], 0
    for p in ordered:
        offsets.append(-(-end // align) * align)
        end = offsets[-1] + p.numel
    part = -(-end // (2 * size)) * 2
    shares = []
    for p, at in zip(ordered, offsets, strict=True):
        held = holders(at, at + p.numel, part)
        intervals = Intervals(held.values(), p.columns)
        shares.append(Share(p, request.is_low_rank(p), np.array(list(held), np.int64), intervals))
    return Spread(size, False, tuple(shares), np.full(size, part), part)


def _zero3(request: Request) -> Spread:
    """Each parameter cut into N padded parts, packed by sub-groups (``stage3.py``, ``_create_fp16_sub_groups``)."""
    size, everyone = request.world_size, np.arange(request.world_size)
    parts = [-(-p.numel // size) for p in request.parameters]
    shares, calls, call = [], [0], 0
    for p, part in zip(request.parameters, parts, strict=True):
        if calls[call] >= request.zero.sub_group_size:
            calls.append(0)
            call += 1
        calls[call] += part
        shares.append(Share(p, request.is_low_rank(p), everyone, _equal(p.numel, size, p.columns), call))
    return Spread(size, True, tuple(shares), np.full(size, sum(parts)), max(calls))


def _fsdp2(request: Request) -> Spread:
    """``Shard(0)``: whole slices of dim 0, as ``torch.chunk`` deals them out."""
    size, everyone = request.world_size, np.arange(request.world_size)
    shares, held = [], np.zeros(size, np.int64)
    for p in request.parameters:
        rows = p.shape[0] if p.shape else 1
        intervals = _equal(rows, size, p.columns, p.numel // max(1, rows))
        shares.append(Share(p, request.is_low_rank(p), everyone, intervals))
        held += intervals.numel
    return Spread(size, True, tuple(shares), held)


def _ddp(request: Request) -> Spread:
    """A matrix is stepped by one rank, a vector by each in part."""
    size, everyone = request.world_size, np.arange(request.world_size)
    if size == 1:
        return replicated(request)
    low_rank = {p.name: request.is_low_rank(p) for p in request.parameters}
    owner = owners({p.name: p.numel for p in request.parameters if low_rank[p.name]}, size)
    shares = []
    for p in request.parameters:
        if low_rank[p.name]:
            shares.append(Share(p, True, np.array([owner[p.name]]), Intervals([(0, p.numel)], p.columns)))
        else:
            shares.append(Share(p, False, everyone, _equal(p.numel, size, p.columns)))
    return Spread(size, False, tuple(shares))


@functools.lru_cache(maxsize=64)  # the same few shapes come again and again, and there may be thousands of ranks
def _equal(numel: int, parts: int, q: int, inner: int = 1) -> Intervals:
    """``numel`` slices of ``inner`` elements in equal parts."""
    return Intervals([(start * inner, stop * inner) for start, stop in equal_ranges(numel, parts)], q)
