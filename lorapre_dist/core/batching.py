"""What goes through a step together: matrices that are alike as one stack, stacks in buckets, buckets in waves.

    stack    matrices of one shape that lie alike on the same ranks: one tensor with a dimension more, in front, so that
             an operation is done once for all of them; a matrix alone is a stack of one
    bucket   stacks whose gathered factors and gradients of factors are in flight at a time; a stack that is not shared
             is one by itself, as its weights are copied
    wave     buckets whose Grams are solved together, each by one rank, so that all ranks have some to solve

A rank's shared matrices come first: ranks wait for each other there, and a rank that had its own to do before would
keep the others waiting. Peers have to find the same buckets, though each holds other matrices beside those that they
share: a matrix's place follows from what is ahead of it in the layout (``before``), the same on all of them.

All of this is decided by shapes; the planner asks here as well, with outlines of matrices that nobody holds and without
torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .interval import Peers, RowInterval, column_block
from .sizes import CHUNK, Sizes

Run = list[int]
Bucket = list[Run]


@dataclass(frozen=True)
class Outline:
    """What decides how a matrix goes through a step (``batching.py``), its elements apart.

    Attributes:
        shape: of the whole matrix.
        rows: touched on this rank.
        ranks: of the factors of each moment.
        statistics: numbers of state beside the factors.
        itemsize: bytes of a number.
        parts: ranks that share the matrix.
        lends: see :attr:`lorapre_dist.core.factors.Matrix.lends`.
        largest: bytes of the largest piece that any rank holds.
        alike: the same for matrices that can be one stack: of one shape, that lie alike on the same ranks.
        turn: see :class:`lorapre_dist.core.interval.Peers`.
        before: see :class:`lorapre_dist.layouts.base.Piece`.
        widened: sum of the ranks of the factors that are kept in fewer bits, and widened for a step.
        gathered: rows of ``B`` that a step gathers, and with each so many ``row_statistics``.
    """

    shape: tuple[int, int]
    rows: int
    ranks: tuple[int, ...]
    statistics: int
    itemsize: int
    parts: int
    lends: bool
    largest: int
    alike: tuple[Hashable, ...]
    turn: int
    before: tuple[int, int, int]
    widened: int = 0
    gathered: int = 0
    row_statistics: int = 0

    @property
    def block_size(self) -> int:
        """Columns in every rank's block of ``A``, the last ones padded."""
        return -(-self.shape[1] // self.parts)

    def bytes(self, columns: int, squares: int) -> int:
        """Bytes of so many columns of ``A``, or rows of ``B``, and so many r x r matrices, of all moments."""
        return (columns * sum(self.ranks) + squares * sum(r * r for r in self.ranks)) * self.itemsize


def outline(
    interval: RowInterval,
    peers: Peers | None,
    ranks: Sequence[int],
    statistics: int,
    itemsize: int,
    before: tuple[int, int, int],
    *kind: Hashable,
    widened: int = 0,
    row_statistics: int = 0,
) -> Outline:
    """That of a matrix of which this rank holds ``interval``, shared with ``peers``.

    Args:
        kind: what else has to be the same of matrices in a stack, beside shape, ranks and how they lie.
        widened, row_statistics: see :class:`Outline`.
    """
    shape = interval.shape
    largest = interval.numel if peers is None else peers.largest(shape)
    lying = peers and (id(peers.group), peers.ranges, peers.columns)
    return Outline(
        shape=shape,
        rows=interval.rows,
        ranks=tuple(ranks),
        statistics=statistics,
        itemsize=itemsize,
        parts=len(peers.ranges) if peers else 1,
        lends=peers is None or peers.own_columns(shape),
        largest=largest * itemsize,
        alike=(shape, lying, *ranks, *kind),
        turn=peers.turn if peers else 0,
        before=before,
        widened=widened,
        gathered=interval.rows if peers is not None and peers.deals_rows(shape) else 0,
        row_statistics=row_statistics,
    )


@dataclass(frozen=True)
class Limits:
    """How much goes together.

    Attributes:
        bucket: bytes of a bucket, and of what a wave keeps.
        block: bytes of a row block, and of a stack's weights.
        fewest: matrices are stacked if so many of them fit in a block.
        per_element: bytes per element of a matrix that a step keeps beside factors and Grams.
    """

    bucket: int
    block: int
    fewest: int
    per_element: int = 0

    @classmethod
    def of(cls, sizes: Sizes, kind: str, per_element: int = 0) -> Limits:
        """Those of a workspace on a kind of device (``"cpu"``, ``"cuda"``)."""
        return cls(sizes.bucket_on(kind), sizes.block_on(kind), sizes.fewest_on(kind), per_element)


def plan(outlines: Sequence[Outline], limits: Limits, others: Sequence[Hashable] = ()) -> Iterator[list[Bucket]]:
    """The waves of a step in order: of each the buckets, of those the stacks, of those the places in ``outlines``.

    Args:
        others: what has to be the same of matrices in a stack beside :attr:`Outline.alike`.
    """
    kinds = [(one.alike, *others[k : k + 1]) for k, one in enumerate(outlines)]
    shared: dict[tuple[int, int, int], Run] = defaultdict(list)
    local: Run = []
    for k, one in enumerate(outlines):
        if one.parts > 1:
            count, columns, _ = one.before
            wave, bucket = (x // limits.bucket for x in (_kept(one, count, columns), _place(one, limits)))
            shared[one.turn, wave, bucket].append(k)
        else:
            local.append(k)
    waves: dict[tuple[int, int], list[Bucket]] = defaultdict(list)
    for turn, wave, bucket in sorted(shared):
        waves[turn, wave].append(_stacks(shared[turn, wave, bucket], kinds, outlines, limits))
    yield from waves.values()
    rest: dict[int, Bucket] = defaultdict(list)
    ahead = 0
    for run in _stacks(local, kinds, outlines, limits):
        one = outlines[run[0]]
        rest[ahead // limits.bucket].append(run)
        p, q = one.shape
        ahead += len(run) * (_kept(one, 1, q) + limits.per_element * p * q)
    for runs in rest.values():
        alone = [run for run in runs if len(run) == 1]
        yield [[run] for run in runs if len(run) > 1] + ([alone] if alone else [])


def _stacks(places: Run, kinds: list[Any], outlines: Sequence[Outline], limits: Limits) -> list[Run]:
    if len(places) == 1:  # nothing to compare; what is alike may be long to look at
        return [places]
    equal: dict[Hashable, Run] = defaultdict(list)
    for k in places:
        equal[kinds[k]].append(k)
    found = []
    for run in equal.values():
        size = limits.block // max(1, outlines[run[0]].largest)
        size = size if size >= limits.fewest else 1
        found += [run[k : k + size] for k in range(0, len(run), size)]
    return sorted(found)


def _place(one: Outline, limits: Limits) -> int:
    """Bytes that the matrices ahead of this one would take if they were of its rank."""
    count, columns, elements = one.before
    return one.bytes(5 * columns, 4 * count) + limits.per_element * elements


def _kept(one: Outline, count: int, columns: int) -> int:
    """Bytes that a wave keeps of matrices with so many columns: Z, reduced if it is shared, and Grams."""
    return one.bytes(-(-columns // one.parts), 5 * count)


def transient_bytes(one: Outline) -> int:
    """Bytes of one matrix in a step: gathered factors, their gradients, packed collectives, Grams and inverses."""
    wider = one.widened * (one.rows + one.block_size) * one.itemsize
    # What is sent or has come, and what it is put together to.
    rows = 2 * (one.bytes(one.gathered, 0) + one.gathered * one.row_statistics * one.itemsize)
    return one.bytes(one.block_size * (1 if one.lends else 5 * one.parts), 4) + wider + rows


def overlap_bytes(one: Outline, inverses: bool) -> int:
    """Bytes that one matrix takes from a step to the next where that overlaps: the new A, whole, and Z on its way.

    Args:
        inverses: that of ``A A^T`` is kept as well, in ``paper``.
    """
    whole = one.block_size * (1 if one.lends else one.parts)
    edges = 2 * one.gathered  # of columns' ranks every row is cut, and gathered
    return one.bytes(whole * (1 if one.lends else 2) + edges, int(inverses))


def workspace_bytes(
    outlines: Sequence[Outline],
    sizes: Sizes,
    kind: str,
    per_element: int = 0,
    more: Sequence[int] | None = None,
) -> int:
    """Bound on what a step allocates: the largest wave, the buffers of one row block and of one batch of solves.

    Args:
        per_element: as in :class:`Limits`.
        more: bytes of each matrix that its optimizer allocates beside what all do.
    """
    limits = Limits.of(sizes, kind, per_element)
    each = [transient_bytes(one) + (more[k] if more else 0) for k, one in enumerate(outlines)]
    worst = 0
    for wave in plan(outlines, limits):
        held = max(sum(each[k] + _copied(outlines[k], run) for run in bucket for k in run) for bucket in wave)
        runs = [[outlines[k] for k in run] for bucket in wave for run in bucket]
        worst = max(worst, held + _buffers(runs, sizes.part_on(kind), limits, kind == "cpu"))
    return worst


def _buffers(runs: list[list[Outline]], part: int, limits: Limits, cpu: bool) -> int:
    """Bytes that a wave of stacks takes beside what each bucket's matrices do; AdamW goes by ``part`` bytes."""
    size, block = runs[0][0].itemsize, limits.block
    kept = sum(_kept(one, 1, one.shape[1]) for run in runs for one in run)
    # In fp64: the stacked Grams, their Cholesky factors, the inverses, and a copy that the solver makes.
    squares = [sum(r * r for r in run[0].ranks) for run in runs]
    batch = sum(len(run) * square for run, square in zip(runs, squares, strict=True))
    if cpu:
        batch = min(batch, max(CHUNK, *squares))

    # Four temporaries of a row block stay. Two more where the parameter is of another dtype, or five of AdamW's parts.
    largest, beside, gauged = _of_blocks(runs, limits)
    blocks = 4 * largest + max(2 * largest, 5 * part)
    if any(run[0].widened for run in runs):  # random bits, and what they round
        blocks += 7 * block
    rows = max((r * _rows(run, r, limits) for run in runs for r in run[0].ranks if r), default=0) * size
    return kept + 4 * batch * 8 + blocks + beside + gauged + rows


def _of_blocks(runs: list[list[Outline]], limits: Limits) -> tuple[int, int, int]:
    """Bytes of a row block's temporary, of those on its low-rank side, and of the new A, of the largest of each."""
    size = runs[0][0].itemsize
    blocks = [(_rows(run, run[0].shape[1], limits), run[0]) for run in runs]
    largest = max(rows * one.shape[1] for rows, one in blocks)
    beside = max(4 * rows * sum(one.ranks) for rows, one in blocks)
    gauged = max((r * run[0].block_size * len(run) for run in runs for r in run[0].ranks), default=0)
    return largest * size, beside * size, gauged * size


def _rows(run: list[Outline], columns: int, limits: Limits) -> int:
    """Rows of so many columns that go through a step at a time, of all matrices of a stack."""
    one = run[0]
    at_a_time = max(1, limits.block // (columns * one.itemsize))
    return min(one.rows, at_a_time) if len(run) == 1 else len(run) * _most_rows(one)


def _copied(one: Outline, run: Run) -> int:
    """Bytes that a matrix in a stack copies: weights, gradient and, once, its state."""
    if len(run) == 1:
        return 0
    return 2 * one.largest + one.bytes(_most_rows(one) + one.block_size, 0) + one.statistics * one.itemsize


def _most_rows(one: Outline) -> int:
    """Rows that a piece touches on any rank, at most; a stack's pieces may begin and end in the middle of one."""
    p, q = one.shape
    return min(p, -(-one.largest // (q * one.itemsize)) + 1)


def evenly_dealt(numbers: Sequence[int], ranks: int) -> bool:
    """Whether so many Grams (of each r) are enough for all ranks, so that little of what is sent is padding."""
    return all(-(-n // ranks) * ranks <= 2 * n for n in numbers)


def owned(number: int, ranks: int, index: int) -> tuple[int, int]:
    """From where to where a rank solves ``number`` Grams of one side."""
    return column_block(number, ranks, index)


def kept_bytes(outlines: Sequence[Outline], sizes: Sizes, kind: str, per_element: int = 0) -> int:
    """Bytes of the buffers that steps reuse, which are there between them as well: of row blocks, Z and the new A."""
    limits, worst = Limits.of(sizes, kind, per_element), 0
    for wave in plan(outlines, limits):
        runs = [[outlines[k] for k in run] for bucket in wave for run in bucket]
        # What is reduced into other memory is one bucket's at a time.
        Z = [
            sum(outlines[k].bytes(outlines[k].block_size * outlines[k].parts, 0) for run in b for k in run)
            for b in wave
        ]
        stays = any(one.lends for run in runs for one in run)
        largest, beside, gauged = _of_blocks(runs, limits)
        worst = max(worst, (sum(Z) if stays else max(Z)) + 3 * largest + beside + gauged)
    return worst
