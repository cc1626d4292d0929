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
        A: r x q, of the step before: whole, or this rank's block if it needs no more (:attr:`Matrix.lends`).
        Y: per row that is cut between ranks, the regression of the whole row on the old A (r numbers).
        gram: ``A A^T``, r x r.
        inverse: of the damped ``gram``.
        W: ``inverse A`` (r x q) where that is cheaper than to multiply rows by ``inverse``, else None.
        Z: ``B^T g``, r x q (padded to whole blocks); after the reduction, r x this rank's columns.
        S: ``B^T B``, r x r.
    """

    factors: Factors
    A: Tensor
    Y: Tensor
    gram: Tensor = field(init=False)
    inverse: Tensor = field(init=False)
    W: Tensor | None = field(init=False, default=None)
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
    """``A`` of every moment, whole: one all-gather a group. Where this rank's block is enough, it lends its state.

    Args:
        sums: numbers per cut row that the optimizer sums beside ``Y``.
    """
    waits = []
    for group, shared in by_group(item for item in items if not item.matrix.lends):
        blocks = [_padded(f.A, x.matrix.block_size) for x in shared for f in x.matrix.factors.values()]
        waits.append((comm.all_gather(torch.cat(blocks), group, "gather A"), shared))
    whole: dict[int, list[Tensor]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for item in shared:
            q, size = item.matrix.interval.shape[1], item.matrix.block_size
            for factors in item.matrix.factors.values():
                r = factors.A.shape[0]
                block = gathered[:, at : at + size * r].view(-1, r, size)
                whole.setdefault(id(item), []).append(block.transpose(0, 1).reshape(r, -1)[:, :q])
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
        blocks = _blocks([moment.Z for work in shared for moment in work.moments], shared[0].matrix.parts)
        waits.append((comm.reduce_scatter(blocks, group, "reduce Z"), shared))
    grams = [(g, [moment.S for work in shared for moment in work.moments]) for g, shared in by_group(works)]
    _all_reduce(grams, comm, "Gram of B")
    for wait, shared in waits:
        mine, at = wait(), 0
        for work in shared:
            size = work.matrix.block_size
            for moment in work.moments:
                block = mine[at : at + size * moment.rank].view(moment.rank, size)
                moment.Z = block[:, : moment.factors.A.shape[1]]
                at += size * moment.rank


def _work(item: Item, gathered: list[Tensor] | None, sums: int) -> Work:
    matrix = item.matrix
    wholes = gathered or [factors.A for factors in matrix.factors.values()]
    rows = matrix.peers.cut_rows(matrix.interval.shape) if matrix.peers else ()
    edge = wholes[0].new_zeros(len(rows), sums + sum(A.shape[-2] for A in wholes))
    moments, at = [], sums
    for factors, A in zip(matrix.factors.values(), wholes, strict=True):
        moments.append(Moment(factors, A, edge[:, at : at + A.shape[-2]]))
        at += A.shape[-2]
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
