"""What moves between the ranks that share a matrix: packing, exchanges, unpacking. No arithmetic.

Every item is a stack of k matrices that are alike (``batching.py``), mostly of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .comm import Comm
from .factors import Factors, Matrix
from .guard import Go, Size, bounds, sizes
from .sizes import SAMPLES


@dataclass
class Item:
    """One matrix in a step: its state, and the local pieces of the parameter and gradient (1-D, same length).

    Of a stack of k matrices both are k x n, and all state has a dimension more, too.

    Attributes:
        largest: a bound on the gradient's elements here (0-d; k).
        go: whether the step is taken.
        look: what all ranks know of it (:func:`look`; k lines); None: that is exchanged with ``A``.
        size: what follows from that, where it is known ahead (:func:`size_own`).
    """

    matrix: Matrix
    theta: Tensor
    grad: Tensor
    largest: Tensor
    go: Go
    look: Tensor | None = None
    size: Size | None = None


@dataclass
class Moment:
    """What the phases of a step pass along for one moment of a stack of k matrices.

    Attributes:
        factors: this rank's state: ``B`` k x rows x r, ``A`` k x r x columns.
        A: k x r x q, of the step before: whole, or this rank's block if it needs no more (:attr:`Matrix.lends`).
        Y: per row that is cut between ranks, the regression of the whole row on the old A (k x rows x r).
        inverse: of the damped ``A A^T`` (k x r x r); None where A has orthonormal rows.
        Z: ``B^T g``, k x r x q (padded to whole blocks); after the reduction, k x r x this rank's columns. Of a scaled
            B, as S.
        S: ``B^T B``, k x r x r.
    """

    factors: Factors
    A: Tensor
    Y: Tensor
    inverse: Tensor | None = field(init=False, default=None)
    Z: Tensor = field(init=False)
    S: Tensor = field(init=False)


@dataclass
class Work:
    """One stack of matrices on its way through the phases of a step.

    Attributes:
        matrix: of the item.
        moments: one, or two in the order ``m``, ``v``, as which they can be had, too.
        size: what is squared is scaled by it first.
        cut: line in ``edge`` of each row that is cut between ranks.
        edge: k x cut rows x sums that the optimizer needs (first), then each moment's ``Y``.
        column_sums: numbers to be summed over the ranks beside ``edge``; None where there are none.
        context: what the optimizer's rule keeps from block to block.
    """

    item: Item
    moments: list[Moment]
    size: Size
    cut: dict[int, int]
    edge: Tensor
    column_sums: Tensor | None = None
    context: Any = None
    matrix: Matrix = field(init=False)
    m: Moment = field(init=False)
    v: Moment = field(init=False)

    def __post_init__(self) -> None:
        self.matrix, self.m, self.v = self.item.matrix, self.moments[0], self.moments[-1]

    def release(self) -> None:
        """Let go of what only the update of theta needs."""
        for moment in self.moments:
            moment.A, moment.factors.ahead = moment.factors.A, None
        self.context = None

    def put_down(self) -> None:
        """Let go of weights and gradients: others may free or change them."""
        theta, grad = self.item.theta, self.item.grad
        self.item.theta, self.item.grad = theta.new_empty(len(theta), 0), grad.new_empty(len(grad), 0)


class _HasMatrix(Protocol):
    @property
    def matrix(self) -> Matrix: ...


_T = TypeVar("_T", bound=_HasMatrix)
Wait = Callable[[], None]


def by_group(works: Iterable[_T]) -> list[tuple[Any, list[_T]]]:
    """Shared matrices by process group, groups in order of first use (the same order on every rank)."""
    found: dict[int, tuple[Any, list[_T]]] = {}
    for work in works:
        matrix = work.matrix
        if matrix.peers is not None:
            found.setdefault(id(matrix.peers.group), (matrix.peers.group, []))[1].append(work)
    return list(found.values())


@dataclass
class Seen:
    """A matrix with this rank's piece of the gradient (1-D) and a bound on that (0-d); None: it has none."""

    matrix: Matrix
    grad: Tensor | None
    largest: Tensor | None


def look(seen: Sequence[Seen], comm: Comm) -> Callable[[], dict[int, Tensor]]:
    """Start to exchange what ranks know of the matrices that they share, ahead of a step: one all-gather a group.

    The returned function waits; it gives what all know of each (one line), by the matrix's id.
    """
    state = iter(bounds([f.B for one in seen for f in one.matrix.factors.values()]))
    lines = {}
    for one in seen:
        of_moments = torch.stack([next(state) for _ in one.matrix.factors])[None]
        grad, largest = one.grad, one.largest
        if grad is None or largest is None:
            grad, largest = of_moments.new_zeros(0), of_moments.new_zeros(())
        lines[id(one.matrix)] = _line(one.matrix, grad[None], of_moments, largest[None])
    waits = []
    for group, shared in by_group(seen):
        packed = torch.cat([lines[id(one.matrix)].reshape(-1) for one in shared])
        waits.append((comm.all_gather(packed, group, "look"), shared))

    def finish() -> dict[int, Tensor]:
        found = {}
        for wait, shared in waits:
            every = [lines[id(one.matrix)] for one in shared]
            together = wait().amax(0).split([line.numel() for line in every])
            found.update({id(one.matrix): line[None] for one, line in zip(shared, together, strict=True)})
        return found

    return finish


def size_own(items: Sequence[Item]) -> None:
    """The sizes of all matrices that this rank has to itself and that nobody has looked at, in a few operations.

    On a GPU it is their number that counts: stack by stack they would be 20 for each.
    """
    alike: dict[Any, list[Item]] = {}
    for item in items:
        matrix = item.matrix
        if matrix.peers is None and matrix.wide is None and item.look is None:
            alike.setdefault((item.grad.device, item.grad.dtype, len(matrix.factors)), []).append(item)
    for own in alike.values():
        dtype, factors = own[0].matrix.dtype, [f.B for item in own for f in item.matrix.factors.values()]
        samples = torch.stack([item.grad[item.matrix.sampled] for item in own]).to(dtype).abs_()
        state = torch.stack(bounds(factors)).view(len(own), -1) if factors else samples[:, :0]
        largest = torch.stack([item.largest for item in own]).to(dtype)[:, None]
        lines = torch.cat([samples, state, largest], dim=1).split(1)
        for item, size in zip(own, sizes(list(lines), own[0].go), strict=True):
            item.size = size


def gather(items: list[Item], comm: Comm, sums: int) -> list[Work]:
    """``A`` of every moment, whole, and the matrices' sizes: one all-gather a group, of what is not known already.

    Where this rank's block of ``A`` is enough, it lends its state.

    Args:
        sums: numbers per cut row that the optimizer sums beside ``Y``.
    """
    unknown = [item for item in items if item.look is None and item.size is None]
    looks = dict(zip(map(id, unknown), _looks(unknown), strict=True))
    rows, waits = _gather_rows(items, comm), []
    for group, shared in by_group(items):
        blocks = [_padded(f.A, x.matrix.block_size) for x in shared for f in _lent(x)]
        packed = [*blocks, *(looks[id(x)].reshape(-1) for x in shared if id(x) in looks)]
        if packed:
            waits.append((comm.all_gather(torch.cat(packed), group, "gather A"), shared))
    whole: dict[int, list[Tensor]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for item in shared:
            for factors in _lent(item):
                A = _unpacked(gathered, at, factors.A, item.matrix.block_size)
                whole.setdefault(id(item), []).append(A)
                at += A.numel() // len(gathered)
        for item in shared:
            if id(item) in looks:
                line = looks[id(item)]
                # Each sample lies on one rank, and is 0 on the others.
                looks[id(item)] = gathered[:, at : at + line.numel()].amax(0).view_as(line)
                at += line.numel()
    rows()
    rest = [item for item in items if item.size is None]
    lines = [looks[id(item)] if item.look is None else item.look for item in rest]
    for item, size in zip(rest, sizes(lines, items[0].go) if rest else [], strict=True):
        item.size = size
    return [_work(item, whole.get(id(item)), sums) for item in items]


def _gather_rows(items: list[Item], comm: Comm) -> Wait:
    """Start to bring together all touched rows of ``B``, and of the rows' statistics, where ranks deal them out.

    One exchange a group. The returned function waits.
    """
    waits = []
    for group, shared in by_group(item for item in items if item.matrix.deals_rows):
        ranks = len(shared[0].matrix.parts_of_rows)
        leaving: list[list[Tensor]] = [[] for _ in range(ranks)]
        arriving: list[list[Tensor]] = [[] for _ in range(ranks)]
        for item in shared:
            _rows_to_move(item.matrix, leaving, arriving)
        waits.append(comm.all_to_all(leaving, arriving, group, "gather B"))

    def finish() -> None:
        for wait in waits:
            wait()

    return finish


def _rows_to_move(matrix: Matrix, leaving: list[list[Tensor]], arriving: list[list[Tensor]]) -> None:
    """Make room for all touched rows of a stack, and say what of them goes to each rank and comes from it."""
    blocks, first = matrix.parts_of_rows, matrix.interval.first_row
    assert matrix.peers is not None
    own, matrix.rest = matrix.peers.index, {}
    for key, kept in matrix.rows().items():
        matrix.rest[key] = kept
        whole = kept.new_empty(kept.shape[0], matrix.interval.rows, *kept.shape[2:])
        for k in matrix.peers.team(matrix.interval.shape):
            low, high = blocks[k]
            place = whole[:, low - first : high - first]
            if k == own:
                place.copy_(kept)
            else:
                leaving[k].append(kept)
                arriving[k].append(place)
        leaving[own].append(kept[:0])  # of a rank that has nothing to send it is the type
        arriving[own].append(kept[:0])
        matrix.take_rows(key, whole)


def keep_rows(works: Iterable[Work], statistics: bool) -> None:
    """Where a step has gathered rows: what this rank keeps of them, as they are now, the statistics or the factors."""
    for matrix in (work.matrix for work in works if work.matrix.rest is not None):
        (low, high), first, now = matrix.kept_rows, matrix.interval.first_row, matrix.rows()
        assert matrix.rest is not None
        for key, rest in matrix.rest.items():
            if (key in matrix.vectors) == statistics:
                rest.copy_(now[key][:, low - first : high - first])
                matrix.take_rows(key, rest)


def gather_ahead(works: Sequence[Work], comm: Comm) -> list[list[Tensor | None]]:
    """``A`` of each work and moment, whole and padded to blocks, as the next step needs it: one all-gather a group.

    None where this rank's block is enough.
    """
    waits = []
    for group, shared in by_group(work for work in works if not work.matrix.lends):
        blocks = [_padded(moment.factors.A, work.matrix.block_size) for work in shared for moment in work.moments]
        waits.append((comm.all_gather(torch.cat(blocks), group, "gather A"), shared))
    found: dict[int, list[Tensor | None]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for work in shared:
            for moment in work.moments:
                A = _unpacked(gathered, at, moment.factors.A, work.matrix.block_size)
                found.setdefault(id(work), []).append(A)
                at += A.numel() // len(gathered)
    return [found.get(id(work)) or [None] * len(work.moments) for work in works]


def sum_edges(works: list[Work], comm: Comm, largest: bool = False) -> Callable[[], None]:
    """Start to sum what the optimizer needs of rows that are cut between ranks: one all-reduce a group.

    With ``largest`` it is the largest over the ranks. The returned function waits.
    """
    tensors = []
    for group, shared in by_group(works):
        parts = [work.edge for work in shared if work.edge.numel()]
        tensors.append((group, [*parts, *(w.column_sums for w in shared if w.column_sums is not None)]))
    return _all_reduce(tensors, comm, "edge rows", largest)


def reduce(works: list[Work], comm: Comm) -> None:
    """Sum Z into each rank's block of columns: one reduce-scatter a group."""
    waits = []
    for group, shared in by_group(work for work in works if work.matrix.low_rank and not work.matrix.lends):
        blocks = _blocks([moment.Z for work in shared for moment in work.moments], shared[0].matrix.parts)
        waits.append((comm.reduce_scatter(blocks, group, "reduce Z"), shared))
    for wait, shared in waits:
        mine, at = wait(), 0
        for work in shared:
            width = work.matrix.block_size
            for moment in work.moments:
                k, r = moment.Z.shape[:2]
                block = mine[at : at + k * r * width].view(k, r, width)
                moment.Z = block[..., : moment.factors.A.shape[-1]]
                at += k * r * width


def sum_grams(holders: Sequence[_HasMatrix], grams: Sequence[Sequence[Tensor]], comm: Comm) -> None:
    """Sum Grams of what ranks hold of a matrix (some for each of ``holders``) over the ranks, in place, on all."""
    of = {id(one): some for one, some in zip(holders, grams, strict=True)}
    by = [(group, [gram for one in shared for gram in of[id(one)]]) for group, shared in by_group(holders)]
    _all_reduce(by, comm, "Grams")()


def _lent(item: Item) -> list[Factors]:
    """The factors whose ``A`` has to be gathered."""
    return [] if item.matrix.lends else [f for f in item.matrix.factors.values() if f.ahead is None]


def _looks(items: list[Item]) -> list[Tensor]:
    """What this rank knows of each matrix (k x n), see :func:`lorapre_dist.core.guard.sizes`."""
    parts = [B for item in items for f in item.matrix.factors.values() for B in f.B.unbind()]
    state = iter(bounds(parts))
    found = []
    for item in items:
        number = len(item.theta)
        of_moments = torch.stack([next(state) for _ in item.matrix.factors for _ in range(number)]).view(-1, number).T
        found.append(_line(item.matrix, item.grad, of_moments, item.largest))
    return found


def _line(matrix: Matrix, grad: Tensor, of_moments: Tensor, largest: Tensor) -> Tensor:
    """What is known of k matrices: of the gradient (k x n), of the factors ``B`` (k x moments), and ``largest`` (k)."""
    return torch.cat([_sampled(matrix, grad), of_moments, largest[:, None].to(of_moments.dtype)], dim=1)


def _sampled(matrix: Matrix, grad: Tensor) -> Tensor:
    """The gradients' elements that are looked at, absolute; 0 where they lie elsewhere."""
    places = matrix.sampled
    assert places is not None
    if not grad.shape[-1]:
        return grad.new_zeros(len(grad), SAMPLES, dtype=matrix.dtype)
    return grad[:, places].to(matrix.dtype).abs_().mul_(places >= 0)


def _work(item: Item, gathered: list[Tensor] | None, sums: int) -> Work:
    matrix, size = item.matrix, item.size
    assert size is not None
    q = matrix.interval.shape[1]
    wholes = [f.A if f.ahead is None or f.ahead.A is None else f.ahead.A for f in matrix.factors.values()]
    wholes = [A[..., :q] for A in gathered or wholes]
    rows = matrix.peers.cut_rows(matrix.interval.shape) if matrix.peers else ()
    edge = wholes[0].new_zeros(len(item.theta), len(rows), sums + sum(A.shape[1] for A in wholes))
    moments, at = [], sums
    for factors, A in zip(matrix.factors.values(), wholes, strict=True):
        moments.append(Moment(factors, A, edge[..., at : at + A.shape[1]]))
        at += A.shape[1]
    if matrix.variant == "paper":  # as printed; its damping is absolute
        size = replace(size, inverse=None)
    return Work(item, moments, size, {row: line for line, row in enumerate(rows)}, edge)


def _all_reduce(
    by_group: list[tuple[Any, list[Tensor]]], comm: Comm, purpose: str, largest: bool = False
) -> Callable[[], None]:
    """Start to sum tensors in place, packed into one collective a group; the returned function waits.

    With ``largest`` it is not their sum but the largest of each number.
    """
    waits = []
    for group, tensors in by_group:
        if not tensors:
            continue
        packed = torch.cat([t.reshape(-1) for t in tensors])
        waits.append((comm.all_reduce(packed, group, purpose, largest), tensors))

    def finish() -> None:
        for wait, tensors in waits:
            packed, at = wait(), 0
            for tensor in tensors:
                tensor.copy_(packed[at : at + tensor.numel()].view_as(tensor))
                at += tensor.numel()

    return finish


def _padded(block: Tensor, columns: int) -> Tensor:
    """Blocks of ``A`` (k x r x columns), flat, with zero columns appended up to ``columns``."""
    missing = columns - block.shape[-1]
    return (torch.nn.functional.pad(block, (0, missing)) if missing else block).reshape(-1)


def _unpacked(gathered: Tensor, at: int, block: Tensor, width: int) -> Tensor:
    """All ranks' blocks of ``A`` (such as ``block``, k x r x columns, padded to ``width``), beside each other."""
    k, r = block.shape[:2]
    blocks = gathered[:, at : at + k * r * width].view(len(gathered), k, r, width)  # r may be 0
    return blocks.permute(1, 2, 0, 3).reshape(k, r, len(gathered) * width)


def _blocks(wholes: list[Tensor], parts: int) -> Tensor:
    """Equal blocks of the columns of each of ``wholes`` (k x r x q), those of rank j in line j."""
    sizes = [Z.numel() // parts for Z in wholes]
    lines = wholes[0].new_empty(parts, sum(sizes))
    for block, Z in zip(lines.split(sizes, dim=1), wholes, strict=True):
        k, r, _ = Z.shape
        block.view(parts, k, r, -1).copy_(Z.view(k, r, parts, -1).permute(2, 0, 1, 3))
    return lines
