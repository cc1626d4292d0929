"""Where parameters lie: what every geometry gives."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...core.interval import Range
from .ranges import expert_name, stack_parts

#: Name and shape of parameters, in the order in which they are stepped.
Named = Sequence[tuple[str, tuple[int, ...]]]
#: Of a parameter's name and shape.
IsLowRank = Callable[[str, tuple[int, ...]], bool]
#: Numbers of matrices, of their columns and of their elements.
Before = tuple[int, int, int]


@dataclass(frozen=True)
class Share:
    """One parameter, or a matrix of a stack, and the ranks that hold parts of it.

    Attributes:
        ranks: of those, in order.
        ranges: the row-major interval of each, some perhaps empty; one where every one of ``ranks`` holds all.
        columns: of whole rows (``ranges``), those that each holds; None where rows are not split so.
        call: in which of the optimizer's calls in a step it is stepped.
        before: see :class:`lorapre_dist.layouts.base.Piece`.
        pieces: in how many the layout has it.
        turn: see :class:`lorapre_dist.core.interval.Peers`.
        stack: it is a matrix of a stack; ranks that share one talk in a group of their own.
    """

    name: str
    shape: tuple[int, ...]
    ranks: Sequence[int]
    ranges: tuple[Range, ...]
    columns: tuple[Range, ...] | None = None
    call: int = 0
    before: Before = (0, 0, 0)
    pieces: int = 1
    turn: int = 0
    stack: bool = False

    @property
    def numel(self) -> int:
        """Elements of all of it."""
        return math.prod(self.shape)

    @functools.cached_property
    def numels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Elements of each of :attr:`ranges`, or of the columns of them."""
        start, stop = _bounds(self.ranges)
        if self.columns is None:
            return stop - start
        first, last = _bounds(self.columns)

        def ahead(at: Any) -> Any:  # elements of these columns before it, as in :func:`numel_of`
            row, col = np.divmod(at, self.shape[1])
            return row * (last - first) + np.clip(col - first, 0, last - first)

        return ahead(stop) - ahead(start)

    @property
    def shared(self) -> bool:
        """Whether each rank holds a part."""
        return len(self.ranges) > 1


@dataclass(frozen=True)
class Arrangement:
    """All parameters over the ranks.

    Attributes:
        size: ranks over which they are spread; 1 where each rank holds, and steps, all.
        shares: in the order in which they are stepped.
        partition: of each rank, elements that it steps, padding included; empty where there are no partitions.
        call_elements: of those, the most that one call of the optimizer steps.
        lists_all: see :class:`lorapre_dist.layouts.base.Layout`.
        steps: elements of each rank's results that it sends to all others after a step; empty: none are sent.
        uniform: every rank takes part in every matrix, so that each of them sends the same.
    """

    size: int
    shares: tuple[Share, ...]
    partition: tuple[int, ...] = ()
    call_elements: int = 0
    lists_all: bool = True
    steps: tuple[int, ...] = ()
    uniform: bool = False

    def matrices(self, is_low_rank: IsLowRank) -> Arrangement:
        """The same with low-rank stacks taken apart, and all numbered: what the optimizer binds.

        A parameter of which there are several copies, each shared by ranks of its own, is counted once. Where ranks
        list only what they hold, those are numbered that the same ranks share.
        """
        counted, found = Numbering(), list[Share]()
        numbers, teams = dict[str, Callable[[int], Before]](), defaultdict[Any, Numbering](Numbering)
        for share in self.shares:
            size = 1
            parts = [(0, share)]
            if len(share.shape) == 3 and is_low_rank(share.name, share.shape):
                size, parts = share.shape[0], list(_experts(share))
            if self.lists_all and share.name not in numbers:
                numbers[share.name] = counted.ahead(share.shape, size, share.pieces)
            for e, part in parts:
                if not self.lists_all:
                    of_team = part.shared and len(part.shape) == 2
                    before = teams[tuple(part.ranks)].ahead(part.shape)(0) if of_team else (0, 0, 0)
                else:
                    before = numbers[share.name](e)
                found.append(replace(part, before=before))
        low_rank = [s for s in found if len(s.shape) == 2 and is_low_rank(s.name, s.shape)]
        return replace(self, shares=tuple(found), uniform=all(len(s.ranks) == self.size for s in low_rank))


@dataclass
class Numbering:
    """Counts the matrices of a layout, their columns and their elements."""

    so_far: Before = field(default=(0, 0, 0))

    def ahead(self, shape: tuple[int, ...], size: int = 1, pieces: int = 1) -> Callable[[int], Before]:
        """Of one more parameter: what is ahead of its matrix ``e``.

        Args:
            size: matrices in it.
            pieces: in how many the layout has it, one after the other.
        """
        q = shape[-1] if len(shape) > 1 else 0
        numel = math.prod(shape) // max(1, size) if q else 0
        count, columns, elements = self.so_far
        total = size * pieces
        self.so_far = count + total, columns + total * q, elements + total * numel
        return lambda e: (count + e, columns + e * q, elements + e * numel)


def _experts(share: Share) -> Iterator[tuple[int, Share]]:
    """The matrices of a stack, with the ranks that hold a part of each."""
    inner = share.shape[1] * share.shape[2]
    whole = len(share.ranges) < len(share.ranks)  # on each of the ranks
    for e, held in stack_parts(inner, range(len(share.ranges)), share.ranges).items():
        ranks = share.ranks if whole else tuple(share.ranks[k] for k in held)
        at = turn(next(iter(held)), len(held), len(share.ranges))
        name, shape = expert_name(share.name, e), share.shape[1:]
        yield e, Share(name, shape, ranks, tuple(held.values()), call=share.call, turn=at, stack=True)


def _bounds(ranges: Sequence[Range]) -> Any:
    """Starts and stops of ``ranges``, which are as many as ranks; many times faster than a conversion of pairs."""
    return np.fromiter(itertools.chain.from_iterable(ranges), np.int64, 2 * len(ranges)).reshape(-1, 2).T


def turn(first: int, members: int, ranks: int) -> int:
    """The turn in which ``members`` of ``ranks``, the first of them at place ``first``, step what they share."""
    return first % 2 if members < ranks else 0


def replicated(named: Named) -> Arrangement:
    """Every rank holds, and steps, all: one device, ZeRO-0, DDP whose state is not dealt out."""
    return Arrangement(1, tuple(Share(n, s, range(1), ((0, math.prod(s)),)) for n, s in named))
