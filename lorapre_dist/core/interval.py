"""Integer geometry: which rows and columns of a p x q matrix a row-major interval ``[start, stop)`` touches."""

from __future__ import annotations

from dataclasses import dataclass

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


def cut_rows(ranges: tuple[Range, ...], q: int) -> tuple[int, ...]:
    """Rows that more than one of ``ranges`` (which tile the matrix in order; some may be empty) holds a part of."""
    return tuple(sorted({start // q for start, stop in ranges if start < stop and start % q}))


def column_block(q: int, parts: int, index: int) -> Range:
    """Columns of block ``index`` when q columns are dealt out in ``parts`` blocks of ``ceil(q / parts)``."""
    size = -(-q // parts)
    return min(q, index * size), min(q, (index + 1) * size)
