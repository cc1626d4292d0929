"""What moves between the ranks that share a matrix: packing, three exchanges, unpacking. No arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    Of a stack of k matrices (``stacks.py``) both are k x n, and all state has a dimension more, too.

    Attributes:
        largest: a bound on the gradient's elements here (0-d; k).
        go: whether the step is taken.
    """

    matrix: Matrix
    theta: Tensor
    grad: Tensor
    largest: Tensor
    go: Go


@dataclass
class Moment:
    """What the phases of a step pass along for one moment of one matrix.

    Attributes:
        factors: this rank's state.
        A: r x q, of the step before: whole, or this rank's block if it needs no more (:attr:`Matrix.lends`).
        Y: per row that is cut between ranks, the regression of the whole row on the old A (r numbers).
        gram: ``A A^T``, r x r.
        inverse: of the damped ``gram``; None where A has orthonormal rows.
        Z: ``B^T g``, r x q (padded to whole blocks); after the reduction, r x this rank's columns. Of a scaled B, as S.
        S: ``B^T B``, r x r.
    """

    factors: Factors
    A: Tensor
    Y: Tensor
    gram: Tensor = field(init=False)
    inverse: Tensor | None = field(init=False, default=None)
    Z: Tensor = field(init=False)
    S: Tensor = field(init=False)

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.A.shape[-2]


@dataclass
class Work:
    """One matrix on its way through the phases of a step.

    Attributes:
        moments: one, or two in the order m, v.
        size: what is squared is scaled by it first.
        cut: line in ``edge`` of each row that is cut between ranks.
        edge: per cut row, sums that the optimizer needs (first), then each moment's ``Y``.
        column_sums: numbers to be summed over the ranks beside ``edge``; None where there are none.
    """

    item: Item
    moments: list[Moment]
    size: Size
    cut: dict[int, int]
    edge: Tensor
    column_sums: Tensor | None = None

    @property
    def matrix(self) -> Matrix:
        """The matrix's state."""
        return self.item.matrix

    @property
    def m(self) -> Moment:
        """The first moment."""
        return self.moments[0]

    @property
    def v(self) -> Moment:
        """The second moment."""
        return self.moments[1]


class _HasMatrix(Protocol):
    @property
    def matrix(self) -> Matrix: ...


_T = TypeVar("_T", bound=_HasMatrix)


def by_group(works: Iterable[_T]) -> list[tuple[Any, list[_T]]]:
    """Shared matrices by process group, groups in order of first use (the same order on every rank)."""
    found: dict[int, tuple[Any, list[_T]]] = {}
    for work in works:
        matrix = work.matrix
        if matrix.peers is not None:
            found.setdefault(id(matrix.peers.group), (matrix.peers.group, []))[1].append(work)
    return list(found.values())


def by_moment(works: list[Work]) -> list[list[Moment]]:
    """First moments, then second moments."""
    return [list(moments) for moments in zip(*(work.moments for work in works), strict=True)]


def gather(items: list[Item], comm: Comm, sums: int) -> list[Work]:
    """``A`` of every moment, whole, and the matrices' sizes: one all-gather a group.

    Where this rank's block of ``A`` is enough, it lends its state.

    Args:
        sums: numbers per cut row that the optimizer sums beside ``Y``.
    """
    looks = dict(zip(map(id, items), _looks(items), strict=True))
    waits = []
    for group, shared in by_group(items):
        blocks = [_padded(f.A, x.matrix.block_size) for x in shared for f in _lent(x)]
        packed = torch.cat([*blocks, *(looks[id(x)] for x in shared)])
        waits.append((comm.all_gather(packed, group, "gather A"), shared))
    whole: dict[int, list[Tensor]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for item in shared:
            q, width = item.matrix.interval.shape[1], item.matrix.block_size
            for factors in _lent(item):
                r = factors.A.shape[0]
                block = gathered[:, at : at + width * r].view(-1, r, width)
                whole.setdefault(id(item), []).append(block.transpose(0, 1).reshape(r, -1)[:, :q])
                at += width * r
        for item in shared:
            count = looks[id(item)].shape[0]
            # Each sample lies on one rank, and is 0 on the others.
            looks[id(item)] = gathered[:, at : at + count].amax(0)
            at += count
    found = sizes(torch.stack([looks[id(item)] for item in items]), items[0].go) if items else []
    return [_work(item, size, whole.get(id(item)), sums) for item, size in zip(items, found, strict=True)]


def sum_edges(works: list[Work], comm: Comm, grams: bool) -> None:
    """Sum the rows that are cut between ranks (and with ``grams`` those of ``A``): one all-reduce a group."""
    tensors = []
    for group, shared in by_group(works):
        parts: list[Tensor] = []
        for work in shared:
            parts += [work.edge] if work.edge.numel() else []
            parts += [moment.gram for moment in work.moments] if grams else []
            parts += [] if work.column_sums is None else [work.column_sums]
        tensors.append((group, parts))
    _all_reduce(tensors, comm, "edge rows and Gram of A" if grams else "edge rows")


def reduce(works: list[Work], comm: Comm) -> None:
    """Sum Z into each rank's block of columns, and S everywhere: a reduce-scatter and an all-reduce a group."""
    waits = []
    for group, shared in by_group(work for work in works if not work.matrix.lends):
        blocks = _blocks([moment.Z for work in shared for moment in work.moments], shared[0].matrix.parts)
        waits.append((comm.reduce_scatter(blocks, group, "reduce Z"), shared))
    grams = [(g, [moment.S for work in shared for moment in work.moments]) for g, shared in by_group(works)]
    _all_reduce(grams, comm, "Gram of B")
    for wait, shared in waits:
        mine, at = wait(), 0
        for work in shared:
            width = work.matrix.block_size
            for moment in work.moments:
                block = mine[at : at + width * moment.rank].view(moment.rank, width)
                moment.Z = block[:, : moment.factors.A.shape[1]]
                at += width * moment.rank


def sum_grams(holders: Sequence[_HasMatrix], grams: Sequence[Sequence[Tensor]], comm: Comm) -> None:
    """Sum the Grams of blocks of ``A`` (r x r; some for each of ``holders``) over the ranks, in place."""
    of = {id(one): some for one, some in zip(holders, grams, strict=True)}
    by = [(group, [gram for one in shared for gram in of[id(one)]]) for group, shared in by_group(holders)]
    _all_reduce(by, comm, "Gram of A")


def _lent(item: Item) -> list[Factors]:
    """The factors whose ``A`` has to be gathered."""
    return [] if item.matrix.lends else list(item.matrix.factors.values())


def _looks(items: list[Item]) -> list[Tensor]:
    """What this rank knows of each matrix, see :func:`lorapre_dist.core.guard.sizes`."""
    if not items:
        return []
    factors = [f.B for item in items for f in item.matrix.factors.values()]
    parts = [part for B in factors for part in (B.unbind() if B.ndim == 3 else (B,))]
    lead = items[0].grad.shape[:-1]
    state = torch.stack(bounds(parts)).view(len(items), -1, *lead).movedim(1, -1)
    largest = torch.stack([item.largest.to(state.dtype) for item in items])[..., None]
    sampled = torch.stack([_sampled(item) for item in items]).abs_()
    here = torch.stack([item.matrix.sampled for item in items]) >= 0  # type: ignore[misc]
    sampled.mul_(here[:, None] if lead else here)
    return list(torch.cat([sampled, state, largest], dim=-1).unbind())


def _sampled(item: Item) -> Tensor:
    grad = (
        item.grad[..., item.matrix.sampled]
        if item.grad.shape[-1]
        else item.grad.new_zeros(*item.grad.shape[:-1], SAMPLES)
    )
    return grad.to(item.matrix.dtype)


def _work(item: Item, size: Size, gathered: list[Tensor] | None, sums: int) -> Work:
    matrix = item.matrix
    wholes = gathered or [factors.A for factors in matrix.factors.values()]
    rows = matrix.peers.cut_rows(matrix.interval.shape) if matrix.peers else ()
    edge = wholes[0].new_zeros(len(rows), sums + sum(A.shape[-2] for A in wholes))
    moments, at = [], sums
    for factors, A in zip(matrix.factors.values(), wholes, strict=True):
        moments.append(Moment(factors, A, edge[:, at : at + A.shape[-2]]))
        at += A.shape[-2]
    if matrix.variant == "paper":  # as printed; its damping is absolute
        size = replace(size, inverse=None)
    return Work(item, moments, size, {row: line for line, row in enumerate(rows)}, edge)


def _all_reduce(by_group: list[tuple[Any, list[Tensor]]], comm: Comm, purpose: str) -> None:
    """Sum tensors in place, packed into one collective a group."""
    waits = []
    for group, tensors in by_group:
        if not tensors:
            continue
        packed = torch.cat([t.reshape(-1) for t in tensors])
        waits.append((comm.all_reduce(packed, group, purpose), tensors))
    for wait, tensors in waits:
        packed, at = wait(), 0
        for tensor in tensors:
            tensor.copy_(packed[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()


def _padded(block: Tensor, columns: int) -> Tensor:
    """A block of ``A`` (r x columns), flat, with zero columns appended up to ``columns``."""
    return torch.nn.functional.pad(block, (0, columns - block.shape[1])).reshape(-1)


def _blocks(wholes: list[Tensor], parts: int) -> Tensor:
    """Equal blocks of the columns of each of ``wholes`` (r x q), those of rank k in line k."""
    sizes = [Z.numel() // parts for Z in wholes]
    lines = wholes[0].new_empty(parts, sum(sizes))
    for block, Z in zip(lines.split(sizes, dim=1), wholes, strict=True):
        block.view(parts, len(Z), -1).copy_(Z.view(len(Z), parts, -1).transpose(0, 1))
    return lines
