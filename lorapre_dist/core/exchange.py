"""What moves between the ranks that share a matrix: packing, three exchanges, unpacking. No arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .comm import Comm
from .factors import Factors, Matrix


@dataclass
class Item:
    """One matrix in a step: its state, and the local pieces of the parameter and gradient (1-D, same length).

    ``target`` is set if ``theta`` is a copy that the caller has to write back there.
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
        At: q x r, whole, of the step before.
        gram: ``A A^T``, r x r.
        inverse: of the damped ``gram``.
        W: ``At inverse`` (q x r) where that is cheaper than to multiply rows by ``inverse``, else None.
        Zt: ``g^T B``, q x r (padded to whole blocks); after the reduction, this rank's columns x r.
        S: ``B^T B``, r x r.
    """

    factors: Factors
    At: Tensor
    gram: Tensor = field(init=False)
    inverse: Tensor = field(init=False)
    W: Tensor | None = field(init=False, default=None)
    Zt: Tensor = field(init=False)
    S: Tensor = field(init=False)

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.At.shape[1]


@dataclass
class Work:
    """One matrix on its way through the phases of a step.

    Attributes:
        m, v: the two moments.
        cut: line in ``edge`` of each row that is cut between ranks.
        edge: per cut row, ``sum g^2``, ``sum w``, Y (r numbers) and Yv (r_v numbers).
    """

    item: Item
    m: Moment
    v: Moment
    cut: dict[int, int]
    edge: Tensor

    @property
    def matrix(self) -> Matrix:
        """The matrix's state."""
        return self.item.matrix

    @property
    def moments(self) -> tuple[Moment, Moment]:
        """Both moments."""
        return self.m, self.v


_T = TypeVar("_T", Item, Work)


def _by_group(works: Iterable[_T]) -> list[tuple[Any, list[_T]]]:
    """Shared matrices by process group, groups in order of first use (the same order on every rank)."""
    found: dict[int, tuple[Any, list[_T]]] = {}
    for work in works:
        matrix = work.matrix
        if matrix.peers is not None:
            found.setdefault(id(matrix.peers.group), (matrix.peers.group, []))[1].append(work)
    return list(found.values())


def gather(items: list[Item], comm: Comm) -> list[Work]:
    """``At`` of both moments, whole: one all-gather a group. Matrices owned whole lend their state."""
    waits = []
    for group, shared in _by_group(items):
        blocks = [_padded(f.At, x.matrix.block_size) for x in shared for f in (x.matrix.m, x.matrix.v)]
        waits.append((comm.all_gather(torch.cat(blocks), group, "gather A"), shared))
    whole: dict[int, list[Tensor]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for item in shared:
            q, size = item.matrix.interval.shape[1], item.matrix.block_size
            for factors in (item.matrix.m, item.matrix.v):
                r = factors.At.shape[1]
                block = gathered[:, at : at + size * r].reshape(-1, r)[:q]
                whole.setdefault(id(item), []).append(block)
                at += size * r
    return [_work(item, whole.get(id(item))) for item in items]


def sum_edges(works: list[Work], comm: Comm) -> None:
    """Sum the rows that are cut between ranks, and the Grams of ``A``, over the ranks: one all-reduce a group."""
    tensors = [(g, [t for w in shared for t in (w.edge, w.m.gram, w.v.gram)]) for g, shared in _by_group(works)]
    _all_reduce(tensors, comm, "edge rows and Gram of A")


def reduce(works: list[Work], comm: Comm) -> None:
    """Sum Z into each rank's block of columns, and S everywhere: a reduce-scatter and an all-reduce a group."""
    waits = []
    for group, shared in _by_group(works):
        parts = shared[0].matrix.parts
        blocks = torch.cat([moment.Zt.view(parts, -1) for work in shared for moment in work.moments], dim=1)
        waits.append((comm.reduce_scatter(blocks, group, "reduce Z"), shared))
    grams = [(g, [moment.S for work in shared for moment in work.moments]) for g, shared in _by_group(works)]
    _all_reduce(grams, comm, "Gram of B")
    for wait, shared in waits:
        mine, at = wait(), 0
        for work in shared:
            size = work.matrix.block_size
            for moment in work.moments:
                block = mine[at : at + size * moment.rank].view(size, moment.rank)
                moment.Zt = block[: moment.factors.At.shape[0]]
                at += size * moment.rank


def _work(item: Item, gathered: list[Tensor] | None) -> Work:
    matrix = item.matrix
    At, vAt = gathered or (matrix.m.At, matrix.v.At)
    rows = matrix.peers.cut_rows(matrix.interval.shape) if matrix.peers else ()
    edge = At.new_zeros(len(rows), 2 + At.shape[1] + vAt.shape[1])
    cut = {row: line for line, row in enumerate(rows)}
    return Work(item, Moment(matrix.m, At), Moment(matrix.v, vAt), cut, edge)


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
