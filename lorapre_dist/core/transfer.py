"""Moving a matrix between ranks: from the pieces that they hold to one rectangle each, and back.

Plain geometry. Every rank works out by itself, from where everybody's piece lies, what it sends and what it receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .interval import Peers, RowInterval, Segment

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rectangle:
    """Rows ``[row, row_stop)``, columns ``[col, col_stop)`` of a matrix."""

    row: int
    row_stop: int
    col: int
    col_stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return max(0, self.row_stop - self.row), max(0, self.col_stop - self.col)

    def common(self, segment: Segment) -> Rectangle | None:
        """What a segment shares with the rectangle; None if nothing."""
        row, row_stop = max(self.row, segment.row), min(self.row_stop, segment.row + segment.rows)
        col, col_stop = max(self.col, segment.col), min(self.col_stop, segment.col_stop)
        return Rectangle(row, row_stop, col, col_stop) if row < row_stop and col < col_stop else None

    def of(self, block: Tensor, row: int, col: int) -> Tensor:
        """These rows and columns of a block that begins at ``row`` and ``col``."""
        return block[row_slice(self, row), self.col - col : self.col_stop - col]


def row_slice(rectangle: Rectangle, row: int) -> slice:
    """The rectangle's rows, counted from ``row``."""
    return slice(rectangle.row - row, rectangle.row_stop - row)


def on_one(owner: int, ranks: int, shape: tuple[int, int]) -> list[Rectangle]:
    """Each rank's target where one of them gets all of a matrix."""
    p, q = shape
    return [Rectangle(0, p if k == owner else 0, 0, q) for k in range(ranks)]


class Transfer:
    """How the pieces of a p x q matrix become ``targets[k]`` on rank k of those that share it, and come back."""

    def __init__(self, peers: Peers, shape: tuple[int, int], targets: list[Rectangle]) -> None:
        self.targets, self.index = targets, peers.index
        self.segments = []
        for k, (start, stop) in enumerate(peers.ranges):
            columns = None if peers.columns is None else peers.columns[k]
            self.segments.append(RowInterval("", shape, start, stop, columns).segments)

    @property
    def mine(self) -> Rectangle:
        """This rank's target."""
        return self.targets[self.index]

    def leaving(self, k: int) -> list[tuple[Segment, Rectangle]]:
        """What this rank's piece has of rank k's target."""
        return _common(self.segments[self.index], self.targets[k])

    def arriving(self, k: int) -> list[tuple[Segment, Rectangle]]:
        """What rank k's piece has of this rank's target."""
        return _common(self.segments[k], self.mine)

    def in_piece(self, flat: Tensor, k: int) -> list[Tensor]:
        """The parts of this rank's piece (1-D) that belong to rank k's target: views, one per rectangle."""
        found = []
        for segment, part in self.leaving(k):
            block = flat[segment.offset : segment.offset + segment.numel].view(segment.rows, -1)
            found.append(part.of(block, segment.row, segment.col))
        return found

    def in_target(self, block: Tensor, k: int) -> list[Tensor]:
        """The parts of this rank's target that belong to rank k's piece: views, one per rectangle."""
        return [part.of(block, self.mine.row, self.mine.col) for _, part in self.arriving(k)]


def _common(segments: tuple[Segment, ...], target: Rectangle) -> list[tuple[Segment, Rectangle]]:
    return [(segment, part) for segment in segments if (part := target.common(segment)) is not None]
