"""What a step computes: flops of products and of solves, numbers moved through memory, operations started.

From shapes, as ``traffic.py`` says what it sends. Flops of products are exact, to the stripes in which symmetric ones
are taken; numbers moved and operations are what was counted, row block by row block, and held to the count by a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from . import batching
from .batching import Limits, owned
from .interval import RowInterval, Segment, column_block
from .rules.muon import cuts
from .rules.needs import Needs
from .sizes import ROWS, is_striped, stripes
from .traffic import Held, by_group


@dataclass
class Work:
    """Of a rank, in a step.

    Attributes:
        products: flops of matrix products.
        solves: flops of Cholesky factors and inverses.
        moved: bytes read or written in memory.
        calls: operations started.
    """

    products: float = 0
    solves: float = 0
    moved: float = 0
    calls: float = 0

    def add(self, other: Work) -> None:
        """Take more in."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def symmetric(n: int, inner: int, kind: str, stack: int = 1) -> int:
    """Flops of each symmetric n x n product of a stack (n x inner times inner x n)."""
    if stack > 1 or not is_striped(n, kind):
        return 2 * n * n * inner
    return 2 * inner * sum((high - low) * (n - low) for low, high in stripes(n, ROWS))


def symmetric_calls(n: int, kind: str, stack: int = 1) -> int:
    """Operations of such a product: in stripes, one of each, and one to mirror it."""
    return 2 * len(stripes(n, ROWS)) if stack == 1 and is_striped(n, kind) else 1


def triangular(r: int, other: int, lower: bool, stack: int = 1) -> int:
    """Flops of a triangular r x r matrix times r x other (``lower``), or of other x r times it, in stripes."""
    if stack > 1:
        return 2 * r * r * other
    return sum(2 * other * (high - low) * (high if lower else r - low) for low, high in stripes(r, ROWS))


def of_step(matrices: Sequence[Held], needs: Needs, limits: Limits, stable: bool, kind: str) -> Work:
    """Of all matrices of a rank, given in the order in which they are stepped. Arguments as of ``collectives``."""
    total = Work()
    for call in sorted({m.call for m in matrices}):
        some = [m for m in matrices if m.call == call]
        for wave in batching.plan([m.outline for m in some], limits):
            every = [[some[k] for k in run] for bucket in wave for run in bucket]
            for run in every:
                total.add(_of_stack(run[0], len(run), needs, limits, stable, kind))
            total.solves += sum(_solves(every, times=2))  # the Grams of B, and those of A
            total.calls += needs.wave_calls
            if needs.iterations:
                for bucket in wave:
                    runs = [[some[k] for k in run] for run in bucket]
                    total.add(_orthogonal(runs, needs.iterations, limits, kind))
    return total


def _of_stack(one: Held, k: int, needs: Needs, limits: Limits, stable: bool, kind: str) -> Work:
    """Of k matrices alike, this rank's part, the solves apart."""
    outline, interval = one.outline, one.interval
    (_, q), rows, ranks = interval.shape, outline.rows, outline.ranks
    first, last = column_block(q, outline.parts, one.peers.index) if one.peers else (0, q)
    columns, elements, kept = last - first, interval.numel, rows
    if one.peers is not None and one.peers.deals_rows(interval.shape):
        low, high = one.peers.row_blocks(interval.shape)[one.peers.index]
        kept = high - low
    cut = _cut(one)
    held_cut = sum(segment.rows for segment in cut)
    flops = 0
    for moment, r in enumerate(ranks):
        flops += 6 * elements * r  # Y = g A^T, B A and B^T g
        if moment and needs.boundary_sums > 1:
            flops += 2 * sum(segment.numel for segment in cut) * r
            if stable:  # of rows that are held whole the sum of w is known from vA vA^T
                whole = rows - held_cut
                flops += 2 * r * r * whole + (0 if one.peers and outline.lends else symmetric(r, q, kind, k))
        flops += symmetric(r, rows - interval.first_owned, kind, k) + 2 * r * r * columns
        flops += symmetric(r, columns, kind, k)
        if stable:
            flops += triangular(r, columns, True, k) + triangular(r, kept, False, k)
            flops += 2 * r * r * (0 if one.peers is None or one.peers.columns else held_cut)
        else:
            flops += 2 * r * r * ((rows - held_cut) + one.cut)
    blocks = sum(1 for _ in _blocks(interval, limits, outline.itemsize, k))
    factors = sum(ranks) * (rows + columns)
    return Work(
        products=k * flops,
        moved=k * outline.itemsize * (needs.passes * elements + FACTOR_PASSES * factors),
        calls=needs.stack_calls + needs.block_calls * blocks + sum(2 * symmetric_calls(r, kind, k) - 2 for r in ranks),
    )


#: How often a number of the factors is read or written in a step, beside a block's own.
FACTOR_PASSES = 27


def _cut(one: Held) -> tuple[Segment, ...]:
    """The segments of this rank's piece in rows that are cut between ranks."""
    if one.peers is None:
        return ()
    segments = one.interval.segments
    if one.peers.columns is not None:
        return segments
    q = one.interval.shape[1]
    return tuple(s for s in segments if s.col or s.col_stop < q)


def _blocks(interval: RowInterval, limits: Limits, itemsize: int, k: int) -> Iterator[int]:
    """Rows of each block in which a piece is stepped."""
    for segment in interval.segments:
        most = max(1, limits.block // ((segment.col_stop - segment.col) * itemsize)) if k == 1 else segment.rows
        yield from range(0, segment.rows, -(-segment.rows // -(-segment.rows // most)))


def _solves(runs: list[list[Held]], times: int) -> Iterator[float]:
    """Flops of this rank's solves: a Cholesky factor and an inverse of each Gram, r^3."""
    yield from (times * sum(r**3 for r in m.outline.ranks) for run in runs for m in run if m.peers is None)
    for shared in by_group(runs):
        peers = shared[0].peers
        assert peers is not None
        numbers: dict[int, int] = {}
        for m in shared:
            for r in m.outline.ranks:
                numbers[r] = numbers.get(r, 0) + 1
        for r, number in numbers.items():
            low, high = owned(number, len(peers.ranges), peers.index)
            yield times * (high - low) * r**3


def _orthogonal(runs: list[list[Held]], iterations: tuple[int, ...], limits: Limits, kind: str) -> Work:
    """What making the updates of a bucket orthogonal takes."""
    work = Work()
    for run in runs:
        if run[0].peers is None:
            p, q = run[0].interval.shape
            work.add(_iterated("whole", (p, q), (p, q), True, iterations, kind, len(run), run[0].outline.itemsize))
    for shared in by_group(runs):
        peers = shared[0].peers
        assert peers is not None
        plans = cuts.plan([(m.interval.shape, m.peers, m.outline.itemsize) for m in shared], iterations, limits.block)
        for m, plan in zip(shared, plans, strict=True):
            target = cuts.target(plan.form, m.peers or peers, m.interval.shape, plan.owner, peers.index)
            owns = plan.owner == peers.index
            work.add(
                _iterated(plan.form, m.interval.shape, target.shape, owns, iterations, kind, 1, m.outline.itemsize)
            )
    return work


def _iterated(
    form: str,
    shape: tuple[int, int],
    X: tuple[int, int],
    owns: bool,
    iterations: tuple[int, ...],
    kind: str,
    k: int,
    itemsize: int,
) -> Work:
    """Grams of this rank's X, the iterations if it ``owns`` them, and products with X."""
    n, (rows, columns) = cuts.side(form, shape), X
    inner = rows * columns // n
    flops = number = 0
    squares = ITERATION_PASSES * sum(iterations) * owns
    for steps in iterations:
        flops += symmetric(n, inner, kind, k) + 2 * n * rows * columns
        number += 1
        if owns:
            square = symmetric(n, n, kind, k)
            flops += steps * square + (steps - 1) * (square + 2 * n**3 + square)
            number += 3 * steps - 2
    return Work(
        products=k * flops,
        moved=k * itemsize * (ORTHOGONAL_PASSES * rows * columns + n * n * (GRAM_PASSES * len(iterations) + squares)),
        calls=ORTHOGONAL_CALLS + ITERATION_CALLS * sum(iterations) * owns + number * symmetric_calls(n, kind, k),
    )


#: Numbers of X read or written to normalise it and bring it back, and operations for it; those of an iteration.
ORTHOGONAL_PASSES, ORTHOGONAL_CALLS, ITERATION_CALLS = 23, 19, 4
#: Numbers read or written for each one of a Gram: to sum it up and use it, and in an iteration.
GRAM_PASSES, ITERATION_PASSES = 5, 22
