"""Which elements of every parameter every rank holds, as arrays over ranks: what the layouts do, without the ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorapre_dist.core.interval import Range, column_block, cut_rows
from lorapre_dist.layouts.ranges import equal_ranges, expert_name, holders, overlap, owners

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
    """One parameter, or one matrix of a low-rank stack, and the ranks that share it.

    Attributes:
        ranks: of those, in order; under ZeRO-3 and FSDP2 all, also with nothing.
        held: the interval of each.
        ahead: numbers of matrices and of their columns ahead of it, as ``layouts/matrices.py`` counts them.
        call: in which of the optimizer's calls per step it is stepped (one for each sub-group of ZeRO-3).
    """

    parameter: Parameter
    low_rank: bool
    ranks: Array
    held: Intervals
    ahead: tuple[int, int]
    call: int = 0


@dataclass(frozen=True)
class Spread:
    """All parameters over the ranks.

    Attributes:
        ranks: how many of them differ; 1 where each rank holds the same.
        uniform: every rank takes part in every matrix, so that all of them send the same.
        shares: in the order in which they are stepped.
        own_order: a rank knows of its own parameters alone, so that none counts what is ahead of them.
        partition: elements of master weights on each rank, padding included; 0 where there are no partitions.
        call_elements: of those, the largest share that one call of the optimizer steps.
    """

    ranks: int
    uniform: bool
    shares: tuple[Share, ...]
    partition: Array = field(default_factory=lambda: np.zeros(1, np.int64))
    call_elements: int = 0
    own_order: bool = False

    def total(self, share: Share, values: Any) -> Array:
        """``values``, one for each of the share's ranks, as an array over all ranks."""
        found = np.zeros(self.ranks, np.int64)
        found[share.ranks] = values
        return found


def spread(request: Request) -> Spread:
    """The layout that the request asks for."""
    make = {"zero1": _zero12, "zero2": _zero12, "zero3": _zero3, "fsdp2": _fsdp2, "ddp": _ddp}
    return make.get(request.layout, replicated)(request)


class _Shares:
    """Collects the shares of a layout, low-rank stacks matrix by matrix."""

    def __init__(self, request: Request) -> None:
        self.request, self.found = request, list[Share]()
        self._ahead = 0, 0

    def add(self, p: Parameter, ranks: Array, held: Intervals, call: int = 0, pieces: int = 1) -> None:
        """``p`` on ``ranks``, in the order of the layout, which has it as so many pieces."""
        (count, columns), q = self._ahead, p.shape[-1] if len(p.shape) > 1 else 0
        low_rank = self.request.is_low_rank(p)
        size = p.shape[0] if low_rank and len(p.shape) == 3 else pieces
        self._ahead = count + size, columns + size * q
        if not (low_rank and len(p.shape) == 3):
            self.found.append(Share(p, low_rank, ranks, held, (count, columns), call))
            return
        for e, parts in _experts(p.shape, ranks, held).items():
            matrix = Parameter(expert_name(p.name, e), p.shape[1:])
            intervals = _shared(tuple(parts.values()), q)
            ahead = count + e, columns + e * q
            self.found.append(Share(matrix, True, _array(parts), intervals, ahead, call))

    def spread(self, ranks: int, **rest: Any) -> Spread:
        """The layout; without ``uniform`` where there are stacks, whose matrices few ranks share."""
        stacks = any(len(p.shape) == 3 and self.request.is_low_rank(p) for p in self.request.parameters)
        rest["uniform"] = rest.get("uniform", False) and not stacks
        return Spread(ranks, shares=tuple(self.found), **rest)


def replicated(request: Request) -> Spread:
    """Every rank holds, and steps, all (ZeRO-0)."""
    shares = _Shares(request)
    for p in request.parameters:
        shares.add(p, np.arange(1), Intervals([(0, p.numel)], p.columns))
    return shares.spread(1)


def _zero12(request: Request) -> Spread:
    """DeepSpeed's one flat buffer, padded to 2 N elements and cut into N parts (``stage_1_and_2.py``)."""
    size, shares = request.world_size, _Shares(request)
    ordered = list(request.parameters)
    if request.zero.round_robin_gradients:
        ordered = [p for _, p in sorted(enumerate(ordered), key=lambda pair: pair[0] % size)]
    align = 16 // request.width if request.zero.parameter_alignment else 1
    offsets, end = [], 0
    for p in ordered:
        offsets.append(-(-end // align) * align)
        end = offsets[-1] + p.numel
    part = -(-end // (2 * size)) * 2
    for p, at in zip(ordered, offsets, strict=True):
        held = holders(at, at + p.numel, part)
        shares.add(p, _array(held), Intervals(held.values(), p.columns))
    return shares.spread(size, partition=np.full(size, part), call_elements=part, own_order=True)


def _zero3(request: Request) -> Spread:
    """Each parameter cut into N padded parts, packed by sub-groups (``stage3.py``, ``_create_fp16_sub_groups``)."""
    size, shares = request.world_size, _Shares(request)
    calls = [0]
    for p in request.parameters:
        if calls[-1] >= request.zero.sub_group_size:
            calls.append(0)
        calls[-1] += -(-p.numel // size)
        shares.add(p, np.arange(size), _equal(p.numel, size, p.columns), len(calls))
    return shares.spread(size, uniform=True, partition=np.full(size, sum(calls)), call_elements=max(calls))


def _fsdp2(request: Request) -> Spread:
    """``Shard(0)``: whole slices of dim 0, as ``torch.chunk`` deals them out."""
    size, shares = request.world_size, _Shares(request)
    elements = np.zeros(size, np.int64)
    for p in request.parameters:
        held = _slices(p, size)
        shares.add(p, np.arange(size), held)
        elements += held.numel
    return shares.spread(size, uniform=True, partition=elements)


def _ddp(request: Request) -> Spread:
    """A matrix is stepped by one rank, any other parameter by each in part."""
    size, shares = request.world_size, _Shares(request)
    if size == 1:
        return replicated(request)
    matrices = {p.name: _matrices(p) for p in request.parameters if request.kept_as(p) is not None}
    owner = owners({m.name: m.numel for found in matrices.values() for m in found}, size)
    for p in request.parameters:
        for matrix in matrices.get(p.name, ()):
            shares.add(matrix, np.array([owner[matrix.name]]), Intervals([(0, matrix.numel)], matrix.columns))
        if p.name not in matrices:
            held = _slices(p, size)
            shares.add(p, np.arange(size), held, pieces=int((held.numel > 0).sum()))
    return shares.spread(size)


def _slices(p: Parameter, size: int) -> Intervals:
    """Whole slices of dim 0, in equal parts."""
    rows = p.shape[0] if p.shape else 1
    return _equal(rows, size, p.columns, p.numel // max(1, rows))


def _matrices(p: Parameter) -> list[Parameter]:
    """A matrix, or those of a stack."""
    if len(p.shape) == 2:
        return [p]
    return [Parameter(expert_name(p.name, e), p.shape[1:]) for e in range(p.shape[0])]


def _experts(shape: tuple[int, ...], ranks: Array, held: Intervals) -> dict[int, dict[int, Range]]:
    """For each matrix of a stack, the ranks that hold a part of it, and which."""
    inner, found = shape[1] * shape[2], dict[int, dict[int, Range]]()
    for rank, (start, stop) in zip(ranks.tolist(), held.ranges, strict=True):
        for e in range(start // inner, -(-stop // inner) if start < stop else 0):
            found.setdefault(e, {})[rank] = overlap(e * inner, (e + 1) * inner, start, stop)
    return found


def _array(ranks: Iterable[int]) -> Array:
    return np.array(list(ranks), np.int64)


@functools.lru_cache(maxsize=4096)  # thousands of experts lie alike, and count their rows once
def _shared(ranges: tuple[Range, ...], q: int) -> Intervals:
    return Intervals(ranges, q)


@functools.lru_cache(maxsize=64)  # the same few shapes come again and again, and there may be thousands of ranks
def _equal(numel: int, parts: int, q: int, inner: int = 1) -> Intervals:
    """``numel`` slices of ``inner`` elements in equal parts."""
    return Intervals([(start * inner, stop * inner) for start, stop in equal_ranges(numel, parts)], q)
