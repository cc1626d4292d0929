"""What moves between the ranks that share a matrix: packing, three exchanges, unpacking. No arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .comm import Comm
from .factors import Factors, Matrix


@dataclass
class Item:
    """One matrix in a step: its state, and the local pieces of the parameter and gradient (1-D, same length).

    ``target`` is set if ``theta`` is a copy that the caller has to write back there. Of a stack of k matrices
    (``stacks.py``) both are k x n, and all state has a dimension more, too.
    """

    matrix: Matrix
    theta: Tensor
    grad: Tensor
    target: Tensor | None = None


@dataclass
class Moment:
    """What the phases of a step pass along for one moment of one matrix.

    Attributes:
        factors: this rank's state.
        At: q x r, of the step before: whole, or this rank's block if it needs no more (:attr:`Matrix.lends`).
        Y: per row that is cut between ranks, the regression of the whole row on the old A (r numbers).
        gram: ``A A^T``, r x r.
        inverse: of the damped ``gram``.
        W: ``At inverse`` (q x r) where that is cheaper than to multiply rows by ``inverse``, else None.
        Zt: ``g^T B``, q x r (padded to whole blocks); after the reduction, this rank's columns x r.
        S: ``B^T B``, r x r.
    """

    factors: Factors
    At: Tensor
    Y: Tensor
    gram: Tensor = field(init=False)
    inverse: Tensor = field(init=False)
    W: Tensor | None = field(init=False, default=None)
    Zt: Tensor = field(init=False)
    S: Tensor = field(init=False)

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.At.shape[-1]


@dataclass
class Work:
    """One matrix on its way through the phases of a step.

    Attributes:
        moments: one, or two in the order m, v.
        cut: line in ``edge`` of each row that is cut between ranks.
        edge: per cut row, sums that the optimizer needs (first), then each moment's ``Y``.
        column_sums: numbers to be summed over the ranks beside ``edge``; None where there are none.
    """

    item: Item
    moments: list[Moment]
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


def gather(items: list[Item], comm: Comm, sums: int) -> list[Work]:
    """``At`` of every moment, whole: one all-gather a group. Where this rank's block is enough, it lends its state.

    Args:
        sums: numbers per cut row that the optimizer sums beside ``Y``.
    """
    waits = []
    for group, shared in by_group(item for item in items if not item.matrix.lends):
        blocks = [_padded(f.At, x.matrix.block_size) for x in shared for f in x.matrix.factors.values()]
        waits.append((comm.all_gather(torch.cat(blocks), group, "gather A"), shared))
    whole: dict[int, list[Tensor]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for item in shared:
            q, size = item.matrix.interval.shape[1], item.matrix.block_size
            for factors in item.matrix.factors.values():
                r = factors.At.shape[1]
                block = gathered[:, at : at + size * r].reshape(-1, r)[:q]
                whole.setdefault(id(item), []).append(block)
                at += size * r
    return [_work(item, whole.get(id(item)), sums) for item in items]


def sum_edges(works: list[Work], comm: Comm) -> None:
    """Sum the rows that are cut between ranks, and the Grams of ``A``, over the ranks: one all-reduce a group."""
    tensors = []
    for group, shared in by_group(works):
        parts: list[Tensor] = []
        for work in shared:
            parts += [work.edge, *(moment.gram for moment in work.moments)]
            parts += [] if work.column_sums is None else [work.column_sums]
        tensors.append((group, parts))
    _all_reduce(tensors, comm, "edge rows and Gram of A")


def reduce(works: list[Work], comm: Comm) -> None:
    """Sum Z into each rank's block of columns, and S everywhere: a reduce-scatter and an all-reduce a group."""
    waits = []
    for group, shared in by_group(work for work in works if not work.matrix.lends):
        parts = shared[0].matrix.parts
        blocks = torch.cat([moment.Zt.view(parts, -1) for work in shared for moment in work.moments], dim=1)
        waits.append((comm.reduce_scatter(blocks, group, "reduce Z"), shared))
    grams = [(g, [moment.S for work in shared for moment in work.moments]) for g, shared in by_group(works)]
    _all_reduce(grams, comm, "Gram of B")
    for wait, shared in waits:
        mine, at = wait(), 0
        for work in shared:
            size = work.matrix.block_size
            for moment in work.moments:
                block = mine[at : at + size * moment.rank].view(size, moment.rank)
                moment.Zt = block[: moment.factors.At.shape[0]]
                at += size * moment.rank


def _work(item: Item, gathered: list[Tensor] | None, sums: int) -> Work:
    matrix = item.matrix
    wholes = gathered or [factors.At for factors in matrix.factors.values()]
    rows = matrix.peers.cut_rows(matrix.interval.shape) if matrix.peers else ()
    edge = wholes[0].new_zeros(len(rows), sums + sum(At.shape[-1] for At in wholes))
    moments, at = [], sums
    for factors, At in zip(matrix.factors.values(), wholes, strict=True):
        moments.append(Moment(factors, At, edge[:, at : at + At.shape[-1]]))
        at += At.shape[-1]
    return Work(item, moments, {row: line for line, row in enumerate(rows)}, edge)


def _all_reduce(by_group: list[tuple[Any, list[Tensor]]], comm: Comm, purpose: str) -> None:
    """Sum tensors in place, packed into one collective a group."""
    waits = []
    for group, tensors in by_group:
        packed = torch.cat([t.reshape(-1) for t in tensors])
        waits.append((comm.all_reduce(packed, group, purpose), tensors))
    for wait, tensors in waits:
        packed, at = wait(), 0
        for tensor in tensors:
            tensor.copy_(packed[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()


def _padded(block: Tensor, rows: int) -> Tensor:
    """A block of ``At`` (columns x r), flat, with zero rows appended up to ``rows``."""
    return torch.nn.functional.pad(block.reshape(-1), (0, (rows - block.shape[0]) * block.shape[1]))
