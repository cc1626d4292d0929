"""Integer geometry: which rows and columns of a p x q matrix a rank holds, and which ranks share it. Without torch."""

from __future__ import annotations

import functools
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

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * (self.col_stop - self.col)


@dataclass(frozen=True)
class RowInterval:
    """The piece ``[start, stop)``, in row-major order, of the p x q matrix ``name`` that one rank holds.

    With ``columns`` it is those columns of the whole rows from ``start`` to ``stop``: a rectangle, as under tensor
    parallelism.
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
            if not 0 <= first <= last <= q or self.start % q or self.stop % q:
                raise ValueError(f"{self.name}: columns [{first}, {last}) need whole rows of a {p} x {q} matrix")

    @property
    def numel(self) -> int:
        """Number of elements held."""
        if self.columns is None:
            return self.stop - self.start
        return (self.stop - self.start) // self.shape[1] * (self.columns[1] - self.columns[0])

    @property
    def first_row(self) -> int:
        """The first row touched (0 if the interval is empty)."""
        return self.start // self.shape[1] if self.numel else 0

    @property
    def rows(self) -> int:
        """Number of rows touched, partly held rows included."""
        return -(-self.stop // self.shape[1]) - self.first_row if self.numel else 0

    @property
    def first_owned(self) -> int:
        """Index, among the touched rows, of the first row whose first element is held here.

        That row and all later ones are counted here in sums over rows; an earlier one is counted elsewhere.
        """
        if self.columns is not None:
            return self.rows if self.columns[0] else 0
        return min(self.rows, 1 if self.start % self.shape[1] else 0)

    def place(self, row: int, col: int) -> int | None:
        """Where an element of the matrix lies in the piece; None if it does not."""
        at = row * self.shape[1] + col - self.start
        if not 0 <= at < self.stop - self.start:
            return None
        if self.columns is None:
            return at
        first, last = self.columns
        return (row - self.first_row) * (last - first) + col - first if first <= col < last else None

    def segments(self) -> list[Segment]:
        """The interval as at most three rectangles: a part of a row, whole rows, a part of a row."""
        q = self.shape[1]
        if self.columns is not None:
            return [Segment(self.first_row, self.rows, *self.columns, 0)] if self.numel else []
        found: list[Segment] = []
        at = self.start
        while at < self.stop:
            row, col = divmod(at, q)
            if col or self.stop - at < q:
                end = min(self.stop, (row + 1) * q)
                found.append(Segment(row, 1, col, col + end - at, at - self.start))
            else:
                end = self.stop // q * q
                found.append(Segment(row, (end - at) // q, 0, q, at - self.start))
            at = end
        return found


@functools.lru_cache(maxsize=256)  # a plan asks again and again, of thousands of ranks
def _largest(ranges: tuple[Range, ...], columns: tuple[Range, ...] | None, q: int) -> int:
    """Of :meth:`Peers.largest`."""
    if columns is None:
        return max(stop - start for start, stop in ranges)
    pairs = zip(ranges, columns, strict=True)
    return max((stop - start) // q * (last - first) for (start, stop), (first, last) in pairs)


@functools.lru_cache(maxsize=256)
def _are_blocks(ranges: tuple[Range, ...], columns: tuple[Range, ...], shape: tuple[int, int]) -> bool:
    """Of :meth:`Peers.own_columns`."""
    blocks = tuple(column_block(shape[1], len(ranges), k) for k in range(len(ranges)))
    return columns == blocks and set(ranges) == {(0, shape[0] * shape[1])}


@functools.lru_cache(maxsize=256)
def cut_rows(ranges: tuple[Range, ...], q: int) -> tuple[int, ...]:
    """Rows that more than one of ``ranges`` (which tile the matrix in order; some may be empty) holds a part of."""
    return tuple(sorted({start // q for start, stop in ranges if start < stop and start % q}))


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
        columns: of whole rows (``ranges``), the columns that each of them holds; None where rows are not split so.
        turn: matrices of few ranks are stepped in two turns. Where each rank shares one with the rank before it and one
            with the next, the pairs that begin with an even rank go first: in one order all would wait in a chain.
    """

    group: Any
    ranges: tuple[Range, ...]
    index: int
    columns: tuple[Range, ...] | None = None
    turn: int = 0

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

    @functools.cached_property
    def _cut(self) -> dict[tuple[int, int], Sequence[int]]:
        """Rows by shape: a step asks for them again and again, and ``ranges`` may be long to look up."""
        return {}
