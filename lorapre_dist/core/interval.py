"""Integer geometry: which rows and columns of a p x q matrix a rank holds, and which ranks share it. Without torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A rectangle of an interval: ``rows`` rows from ``row``, columns ``[col, col_stop)``, at ``offset`` in it.

    Whole rows (``col`` 0, ``col_stop`` q), a part of one row, or a block of columns of many.
    """

    row: int
    rows: int
    col: int
    col_stop: int
    offset: int

    @functools.cached_property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * (self.col_stop - self.col)


def numel_of(start: int, stop: int, q: int, columns: Range | None) -> int:
    """Elements of ``[start, stop)`` of a matrix with q columns, in row-major order; of ``columns`` alone, if given."""
    return stop - start if columns is None else _ahead(stop, q, columns) - _ahead(start, q, columns)


def _ahead(at: int, q: int, columns: Range) -> int:
    """Elements of ``columns`` ahead of the element ``at``."""
    (row, col), (first, last) = divmod(at, q), columns
    return row * (last - first) + min(max(col - first, 0), last - first)


@dataclass(frozen=True)
class RowInterval:
    """The piece ``[start, stop)``, in row-major order, of the p x q matrix ``name`` that one rank holds.

    With ``columns`` it is those of its elements that lie in these columns: of whole rows a rectangle, as under tensor
    parallelism, or such a rectangle cut again as if it were the matrix.
    """

    name: str
    shape: tuple[int, int]
    start: int
    stop: int
    columns: Range | None = None

    def __post_init__(self) -> None:
        p, q = self.shape
        if not 0 <= self.start <= self.stop <= p * q:
            raise ValueError(f"{self.name}: interval [{self.start}, {self.stop}) is outside a {p} x {q} matrix")
        if self.columns is not None:
            first, last = self.columns
            if not 0 <= first <= last <= q:
                raise ValueError(f"{self.name}: columns [{first}, {last}) are outside a {p} x {q} matrix")

    @functools.cached_property
    def numel(self) -> int:
        """Number of elements held."""
        return numel_of(self.start, self.stop, self.shape[1], self.columns)

    @functools.cached_property
    def first_row(self) -> int:
        """The first row touched (0 if the interval is empty)."""
        return self.start // self.shape[1] if self.numel else 0

    @functools.cached_property
    def rows(self) -> int:
        """Number of rows touched, partly held rows included."""
        return -(-self.stop // self.shape[1]) - self.first_row if self.numel else 0

    @functools.cached_property
    def first_owned(self) -> int:
        """Index, among the touched rows, of the first row whose first element is held here.

        That row and all later ones are counted here in sums over rows; an earlier one is counted elsewhere.
        """
        if self.columns is not None and self.columns[0]:
            return self.rows
        return min(self.rows, 1 if self.start % self.shape[1] else 0)

    def place(self, row: int, col: int) -> int | None:
        """Where an element of the matrix lies in the piece; None if it does not."""
        q, (first, last) = self.shape[1], self.columns or (0, self.shape[1])
        at = row * q + col
        held = self.start <= at < self.stop and first <= col < last
        return numel_of(self.start, at, q, self.columns) if held else None

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The interval as at most three rectangles: a part of a row, whole rows, a part of a row."""
        if not self.numel:
            return ()
        q, (first, last) = self.shape[1], self.columns or (0, self.shape[1])
        (row, low), (end, high) = divmod(self.start, q), divmod(self.stop - 1, q)
        low, high = max(low, first), min(high + 1, last)
        if row == end:
            return (Segment(row, 1, low, high, 0),)
        found: list[Segment] = []
        whole, behind = row + (low > first), end + (high == last)
        for begin, rows, *columns in (
            (row, whole - row, low, last),
            (whole, behind - whole, first, last),
            (behind, end + 1 - behind, first, high),
        ):
            if rows:
                offset = found[-1].offset + found[-1].numel if found else 0
                found.append(Segment(begin, rows, columns[0], columns[1], offset))
        return tuple(found)


@functools.lru_cache(maxsize=256)  # a plan asks again and again, of thousands of ranks
def _largest(ranges: tuple[Range, ...], columns: tuple[Range, ...] | None, q: int) -> int:
    """Of :meth:`Peers.largest`."""
    if columns is None:
        return max(stop - start for start, stop in ranges)
    return max(numel_of(*held, q, some) for held, some in zip(ranges, columns, strict=True))


@functools.lru_cache(maxsize=256)
def _are_blocks(ranges: tuple[Range, ...], columns: tuple[Range, ...], shape: tuple[int, int]) -> bool:
    """Of :meth:`Peers.own_columns`."""
    blocks = tuple(column_block(shape[1], len(ranges), k) for k in range(len(ranges)))
    return columns == blocks and set(ranges) == {(0, shape[0] * shape[1])}


@functools.lru_cache(maxsize=256)
def cut_rows(ranges: tuple[Range, ...], q: int) -> tuple[int, ...]:
    """Rows that more than one of ``ranges`` (which tile the matrix in order; some may be empty) holds a part of."""
    return tuple(sorted({start // q for start, stop in ranges if start < stop and start % q}))


@functools.lru_cache(maxsize=256)
def _begun_inside(ranges: tuple[Range, ...], columns: tuple[Range, ...], q: int) -> tuple[int, ...]:
    """Of :meth:`Peers.replicated_rows`, of columns."""
    pairs = zip(ranges, columns, strict=True)
    return tuple(sorted({start // q for (start, stop), (first, _) in pairs if start < stop and start % q > first}))


@functools.lru_cache(maxsize=256)
def row_blocks(ranges: tuple[Range, ...], columns: tuple[Range, ...] | None, q: int) -> tuple[Range, ...]:
    """The rows of ``B`` (and of the statistics of rows) that each rank keeps between steps.

    Those that it touches; the ranks of a team (:func:`row_teams`) deal these out in equal blocks.
    """
    found = [(start // q, -(-stop // q)) if start < stop else (0, 0) for start, stop in ranges]
    if columns is not None:
        pairs = zip(found, ranges, columns, strict=True)
        found = [rows if numel_of(*held, q, some) else (0, 0) for rows, held, some in pairs]
        for members in row_teams(ranges, columns, q).values():
            for place, k in enumerate(members):
                start, stop = found[k]
                low, high = column_block(stop - start, len(members), place)
                found[k] = start + low, start + high
    return tuple(found)


@functools.lru_cache(maxsize=256)
def row_teams(ranges: tuple[Range, ...], columns: tuple[Range, ...], q: int) -> dict[Range, tuple[int, ...]]:
    """The ranks that hold columns of the same whole rows, by these; none if ranks' rows overlap otherwise."""
    teams: dict[Range, tuple[int, ...]] = {}
    for k, (rows, (first, last)) in enumerate(zip(ranges, columns, strict=True)):
        if rows[0] < rows[1] and first < last:
            teams[rows] = (*teams.get(rows, ()), k)
    each = sorted(teams)
    whole = all(start % q == stop % q == 0 for start, stop in each)
    apart = all(before[1] <= after[0] for before, after in itertools.pairwise(each))
    return teams if whole and apart else {}


def column_block(q: int, parts: int, index: int) -> Range:
    """Columns of block ``index`` when q columns are dealt out in ``parts`` blocks of ``ceil(q / parts)``."""
    size = -(-q // parts)
    return min(q, index * size), min(q, (index + 1) * size)


@dataclass(frozen=True)
class Peers:
    """The ranks that share one matrix.

    Attributes:
        group: their process group.
        ranges: the row-major interval of each, in order of group rank; they tile the matrix, some may be empty.
        index: this rank's place among them.
        columns: of ``ranges``, the columns that each of them holds; None where rows are not split so.
        turn: matrices of few ranks are stepped in two turns. Where each rank shares one with the rank before it and one
            with the next, the pairs that begin with an even rank go first: in one order all would wait in a chain.
    """

    group: Any
    ranges: tuple[Range, ...]
    index: int
    columns: tuple[Range, ...] | None = None
    turn: int = 0

    def deals_rows(self, shape: tuple[int, int]) -> bool:
        """Whether ranks that hold columns of the same rows of a p x q matrix deal out what is kept of these."""
        return self.columns is not None and bool(row_teams(self.ranges, self.columns, shape[1]))

    def row_blocks(self, shape: tuple[int, int]) -> tuple[Range, ...]:
        """The rows that each of these ranks keeps of ``B`` of a p x q matrix, see :func:`row_blocks`."""
        return row_blocks(self.ranges, self.columns, shape[1])

    def team(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The ranks, this one among them, that hold columns of the same rows; none if it holds nothing."""
        assert self.columns is not None
        team = row_teams(self.ranges, self.columns, shape[1]).get(self.ranges[self.index], ())
        return team if self.index in team else ()

    def own_columns(self, shape: tuple[int, int]) -> bool:
        """Whether every rank has all rows of a p x q matrix and just the columns that are its block of ``A``."""
        return self.columns is not None and _are_blocks(self.ranges, self.columns, shape)

    def largest(self, shape: tuple[int, int]) -> int:
        """Elements of the largest piece of a p x q matrix that one of these ranks holds."""
        return _largest(self.ranges, self.columns, shape[1])

    def cut_rows(self, shape: tuple[int, int]) -> Sequence[int]:
        """Rows of a p x q matrix that more than one of these ranks holds a part of, in order."""
        if self.columns is not None:
            return range(shape[0])
        if shape not in self._cut:
            self._cut[shape] = cut_rows(self.ranges, shape[1])
        return self._cut[shape]

    def replicated_rows(self, shape: tuple[int, int]) -> Sequence[int]:
        """Rows that ranks hold a part of which have other rows beside it, in order."""
        if self.columns is not None:
            return _begun_inside(self.ranges, self.columns, shape[1])
        return self.cut_rows(shape)

    @functools.cached_property
    def _cut(self) -> dict[tuple[int, int], Sequence[int]]:
        """Rows by shape: a step asks for them again and again, and ``ranges`` may be long to look up."""
        return {}
