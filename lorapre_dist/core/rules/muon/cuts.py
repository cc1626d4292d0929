"""In which form each matrix is orthogonalised, who iterates, and what has to move for it; from shapes, without torch.

rows     whole rows on each rank, as nearly all layouts have them already; its Gram is q x q
columns  a block of columns on each rank; its Gram is p x p
whole    all of it on one rank, only where it is no larger than one row block of the workspace
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...interval import Peers, Range, RowInterval, column_block
from ...sizes import packed_numel
from ...transfer import Rectangle, on_one

#: Iterations of Newton-Schulz on one Gram.
SEGMENT = 3
#: Flops that a rank does in the time of sending one byte: 5e12 a second beside 50 GB a second between GPUs (an H100 on
#: its fp16 units has more of both), 5e10 beside 0.5 GB a second for a CPU core.
FLOPS_PER_BYTE = 100
#: Numbers that a step keeps per element of a matrix: about what :func:`transient_bytes` comes to for a square one.
PER_ELEMENT = 12


@dataclass(frozen=True)
class Cost:
    """Of orthogonalising one p x q matrix in one form, per rank on average: elements sent, and flops."""

    elements: float
    flops: float

    def total(self, itemsize: int) -> float:
        """In bytes: flops count as what could have been sent meanwhile."""
        return self.elements * itemsize + self.flops / FLOPS_PER_BYTE


def cost(form: str, shape: tuple[int, int], ranks: int, segments: Sequence[int], moved: bool) -> Cost:
    """The cost of a form (also of ``"gather"``: every rank gathers all of it and works for itself).

    Args:
        moved: whether the matrix has to be brought into the form (row shards into columns, or the reverse).

    A Gram of side n takes ``n^2 l`` flops by its symmetry (l the other side), the polynomial of s iterations about
    ``(4 s - 3) n^3``, its product with X ``2 n^2 l``.
    """
    p, q = shape
    n, other = (q, p) if form == "rows" or (form != "columns" and q <= p) else (p, q)
    flops = sum(3 * n * n * other + (4 * s - 3) * n**3 for s in segments)
    away = (ranks - 1) / ranks
    if form == "gather":
        return Cost(away * p * q, flops)
    there_and_back = 2 * away * p * q / ranks if moved else 0.0
    grams = 0.0 if form == "whole" else 2 * away * packed_numel(n) * len(segments)
    return Cost(there_and_back + grams, flops / ranks)


def choose(shape: tuple[int, int], ranks: int, segments: Sequence[int], split: str, itemsize: int, limit: int) -> str:
    """The cheapest form of a p x q matrix that lies in ``split`` (``"rows"``, ``"columns"``, or ``"both"``).

    Args:
        limit: bytes up to which a matrix may be assembled on one rank.
    """
    forms = ["rows", "columns"] + (["whole"] if shape[0] * shape[1] * itemsize <= limit else [])
    return min(forms, key=lambda form: cost(form, shape, ranks, segments, form != split).total(itemsize))


def split_of(peers: Peers, shape: tuple[int, int]) -> str:
    """How a matrix lies on its ranks: in ``"rows"`` (perhaps cut inside), in ``"columns"``, or in ``"both"``."""
    if peers.columns is None:
        return "rows"
    return "columns" if all(r == (0, shape[0] * shape[1]) for r in peers.ranges) else "both"


def targets(form: str, peers: Peers, shape: tuple[int, int], owner: int) -> list[Rectangle]:
    """Each rank's rectangle of a form: what it holds already where possible, else equal blocks."""
    (p, q), size = shape, len(peers.ranges)
    split = split_of(peers, shape)
    if form == "whole":
        return on_one(owner, size, shape)
    if form == "rows":
        # A row that is cut between ranks goes to where its first element lies.
        held = [(-(-start // q), -(-stop // q)) for start, stop in peers.ranges]
        blocks = held if split == "rows" else [column_block(p, size, k) for k in range(size)]
        return [Rectangle(*rows, 0, q) for rows in blocks]
    columns = peers.columns if split == "columns" else None
    return [Rectangle(0, p, *c) for c in columns or [column_block(q, size, k) for k in range(size)]]


def target(form: str, peers: Peers, shape: tuple[int, int], owner: int, index: int) -> Rectangle:
    """That of one rank."""
    alone = replace(peers, ranges=peers.ranges[index : index + 1], columns=None)
    if form == "rows" and split_of(peers, shape) == "rows":
        return targets(form, alone, shape, 0)[0]
    return targets(form, peers, shape, owner)[index]


def transient_bytes(
    shape: tuple[int, int], peers: Peers | None, itemsize: int, segments: Sequence[int], limit: int
) -> int:
    """Bytes of one matrix: the piece of m, what is sent and received, X twice, its Gram, packed, and four products.

    The same on every rank that shares the matrix.
    """
    p, q = shape
    piece = X = p * q
    side = min(p, q)
    if peers is not None:
        form = choose((p, q), len(peers.ranges), segments, split_of(peers, (p, q)), itemsize, limit)
        side = {"rows": q, "columns": p}.get(form, side)
        piece, X = _largest(form, (p, q), peers.ranges, peers.columns)
    return (2 * piece + 3 * X + 6 * side * side) * itemsize


@functools.lru_cache(maxsize=256)
def _largest(
    form: str, shape: tuple[int, int], ranges: tuple[Range, ...], columns: tuple[Range, ...] | None
) -> tuple[int, int]:
    """Elements of the largest run of a matrix on any rank, and of the largest rectangle in a form."""
    there = targets(form, Peers(None, ranges, 0, columns), shape, 0)
    return max(stop - start for start, stop in ranges), max(math.prod(target.shape) for target in there)


def segments(steps: int) -> list[int]:
    """Iterations on each Gram: runs of ``SEGMENT``, the last one shorter."""
    return [min(SEGMENT, steps - at) for at in range(0, steps, SEGMENT)]


def is_wide(form: str, shape: tuple[int, int]) -> bool:
    """Whether the Gram of X is ``X X^T``."""
    return form == "columns" or (form == "whole" and shape[0] < shape[1])


def side(form: str, shape: tuple[int, int]) -> int:
    """Rows of the Gram of X."""
    return shape[0] if is_wide(form, shape) else shape[1]


@dataclass(frozen=True)
class Plan:
    """How one matrix that ranks share is orthogonalised.

    Attributes:
        owner: who iterates.
        moved: some elements lie on another rank than in the form.
    """

    form: str
    owner: int
    moved: bool


def plan(lying: Sequence[tuple[tuple[int, int], Peers | None, int]], segments: Sequence[int], limit: int) -> list[Plan]:
    """Of matrices that the same ranks share, in order: each goes to the rank with least to do so far.

    Args:
        lying: of each its shape, the ranks and how it lies on them, and the bytes of a number.
        limit: bytes up to which a matrix may be assembled on one rank.
    """
    load: list[float] = []
    found = []
    for shape, peers, itemsize in lying:
        assert peers is not None
        load = load or [0.0] * len(peers.ranges)
        split = split_of(peers, shape)
        form = choose(shape, len(peers.ranges), segments, split, itemsize, limit)
        owner = load.index(min(load))
        load[owner] += side(form, shape) ** 3
        moved = form != split or (form == "rows" and bool(peers.cut_rows(shape)))
        found.append(Plan(form, owner, moved))
    return found


@functools.lru_cache(maxsize=256)  # matrices of a few shapes lie alike, and there may be thousands of ranks
def moving(
    shape: tuple[int, int], ranges: tuple[Range, ...], columns: tuple[Range, ...] | None, form: str, owner: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements that each rank sends to bring a matrix into its form, and to bring it back."""
    peers, found = Peers(None, ranges, 0, columns), []
    for k, target in enumerate(targets(form, peers, shape, owner)):
        piece = RowInterval("", shape, *ranges[k], None if columns is None else columns[k])
        kept = sum(math.prod(part.shape) for s in piece.segments if (part := target.common(s)) is not None)
        found.append((piece.numel - kept, math.prod(target.shape) - kept))
    return tuple(there for there, _ in found), tuple(back for _, back in found)
