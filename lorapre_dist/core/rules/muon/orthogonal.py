"""Orthogonalise matrices that lie in pieces on several ranks, without assembling any.

Each matrix is brought into one of three forms (``cuts.py``), for which only some of its elements have to move.

The ranks' Grams are summed on one rank, matrix by matrix another one, which iterates there (``newton_schulz.py``) and
sends the polynomial to the others: as many bytes as an all-reduce of the Gram, and no iteration is done twice. A matrix
that this rank owns whole takes the same path without the collectives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...comm import Comm
from ...exchange import by_group
from ...factors import Matrix
from ...guard import Size
from ...linalg import gram, mm, packed, unpacked
from ...sizes import packed_numel
from ...transfer import Transfer
from . import cuts
from .newton_schulz import NewtonSchulz, iteration_dtype, polynomial


@dataclass
class Task:
    """One matrix on its way, or k alike that this rank owns whole.

    That is: this rank's pieces (k x n), its form, who iterates, and in that form X (k x rows x columns), and its Gram
    or Q.

    Attributes:
        size: by which X is scaled before it is squared.
        moved: some elements lie on another rank than in the form.
    """

    matrix: Matrix
    piece: Tensor
    size: Size
    form: str = "whole"
    owner: int = 0
    moved: bool = False
    transfer: Transfer | None = None
    X: Tensor = field(init=False)
    G: Tensor = field(init=False)

    @property
    def wide(self) -> bool:
        """Whether the Gram is ``X X^T``."""
        return cuts.is_wide(self.form, self.matrix.interval.shape)

    @property
    def side(self) -> int:
        """Rows of the Gram."""
        return cuts.side(self.form, self.matrix.interval.shape)

    @property
    def iterates(self) -> bool:
        """Whether this rank takes the iterations."""
        return self.matrix.peers is None or self.matrix.peers.index == self.owner


def orthogonalise(
    pieces: list[tuple[Matrix, Tensor, Size]], settings: NewtonSchulz, comm: Comm, limit: int, bucket: int
) -> None:
    """Replace each rank's pieces (k x n) of its matrices by those of the orthogonalised matrices; a collective.

    Args:
        limit: bytes up to which a matrix may be assembled on one rank.
        bucket: bytes of a collective.
    """
    tasks = [task for matrix, piece, size in pieces for task in _tasks(matrix, piece, size)]
    _plan(tasks, settings, limit)
    for task in tasks:
        shape = task.matrix.interval.shape if task.transfer is None else task.transfer.mine.shape
        whole = len(task.piece), *shape
        task.X = task.piece.new_empty(whole) if task.moved else task.piece.view(whole)
    _exchange(tasks, comm, back=False)
    # A group's matrices of which several ranks hold parts.
    shared = by_group([task for task in tasks if task.form != "whole"])
    _normalise(tasks, shared, settings, comm)
    for steps in settings.segments():
        for task in tasks:
            task.G = gram(task.X, task.wide).to(task.piece.dtype)
        _polynomials(tasks, shared, steps, settings, comm, bucket)
        for task in tasks:
            task.X = mm(task.G, task.X) if task.wide else mm(task.X, task.G)
    for task in tasks:
        task.X = task.X.to(task.piece.dtype)
        if not task.moved:
            task.piece.copy_(task.X.view_as(task.piece))
    _exchange(tasks, comm, back=True)


def _tasks(matrix: Matrix, piece: Tensor, size: Size) -> list[Task]:
    """A stack that this rank owns whole, or each matrix of a shared one, so that ranks can share the iterations."""
    if matrix.peers is None:
        return [Task(matrix, piece, size)]
    return [Task(matrix, piece[k : k + 1], size.of(k)) for k in range(len(piece))]


def _plan(tasks: list[Task], settings: NewtonSchulz, limit: int) -> None:
    """Forms and owners, the same on every rank that shares a matrix."""
    for _, shared in by_group(tasks):
        lying = [(t.matrix.interval.shape, t.matrix.peers, t.matrix.dtype.itemsize) for t in shared]
        for task, plan in zip(shared, cuts.plan(lying, settings.segments(), limit), strict=True):
            task.form, task.owner, task.moved = plan.form, plan.owner, plan.moved
            shape, peers = task.matrix.interval.shape, task.matrix.peers
            assert peers is not None
            task.transfer = Transfer(peers, shape, cuts.targets(plan.form, peers, shape, plan.owner))


def _exchange(tasks: list[Task], comm: Comm, back: bool) -> None:
    """Move parts from pieces to X, or ``back``; one all-to-all a group."""
    waits = []
    for group, some in by_group([task for task in tasks if task.moved]):
        me, size = some[0].matrix.peers.index, some[0].matrix.parts  # type: ignore[union-attr]
        in_pieces = [[part for t in some for part in _parts(t, t.piece, k)] for k in range(size)]
        in_X = [[part for t in some for part in _parts(t, t.X, k)] for k in range(size)]
        leaving, arriving = (in_X, in_pieces) if back else (in_pieces, in_X)
        for source, target in zip(leaving[me], arriving[me], strict=True):
            target.copy_(source)
        nothing = (some[0].X if back else some[0].piece).new_empty(0)  # of a rank without a part of any it is the type
        leaving[me], arriving[me] = [nothing], [nothing]
        waits.append(comm.all_to_all(leaving, arriving, group, "return update" if back else "move m"))
    for wait in waits:
        wait()


def _parts(task: Task, tensor: Tensor, k: int) -> list[Tensor]:
    """What of this rank's piece, or X, lies on rank k in the other arrangement."""
    assert task.transfer is not None
    return task.transfer.in_piece(tensor[0], k) if tensor is task.piece else task.transfer.in_target(tensor[0], k)


def _normalise(tasks: list[Task], shared: list[tuple[Any, list[Task]]], settings: NewtonSchulz, comm: Comm) -> None:
    """Divide by the Frobenius norm of the whole matrix: one number per matrix that is summed over the ranks."""
    for task in tasks:
        task.X = task.size.scaled(task.X)
    squares = {id(task): torch.linalg.vector_norm(task.X, dim=(-2, -1)).square_() for task in tasks}
    waits = [
        (comm.all_reduce(torch.cat([squares[id(t)] for t in some]), group, "norm"), some) for group, some in shared
    ]
    for wait, some in waits:
        squares.update({id(task): square for task, square in zip(some, wait().split(1), strict=True)})
    for task in tasks:
        norm = squares[id(task)].sqrt()
        least = task.size.scaled(torch.full_like(norm, settings.eps)).clamp_min(torch.finfo(norm.dtype).tiny)
        scale = 1 / torch.maximum(norm, least)
        task.X = (task.X * scale[:, None, None]).to(iteration_dtype(task.X.device, task.X.dtype))


def _polynomials(
    tasks: list[Task],
    shared: list[tuple[Any, list[Task]]],
    steps: int,
    settings: NewtonSchulz,
    comm: Comm,
    bucket: int,
) -> None:
    """From each rank's Gram to Q: summed on the owner, iterated there, sent to all."""
    waits = []
    for group, some in shared:
        parts = [(task.owner, packed(task.G)) for task in some]
        waits.append((some, parts, comm.reduce(parts, group, "reduce Gram", bucket)))
    for some, parts, wait in waits:
        wait()
        for task, (_, flat) in zip(some, parts, strict=True):
            if task.iterates:
                unpacked(flat, task.G)
    for task in tasks:
        if task.iterates:
            task.G = polynomial(task.G.to(task.X.dtype), steps, settings.coefficients)
    waits = []
    for group, some in shared:
        parts = [(t.owner, packed(t.G) if t.iterates else t.X.new_empty(packed_numel(t.side))) for t in some]
        waits.append((some, parts, comm.broadcast(parts, group, "broadcast polynomial", bucket)))
    for some, parts, wait in waits:
        wait()
        for task, (_, flat) in zip(some, parts, strict=True):
            if not task.iterates:
                task.G = unpacked(flat, task.X.new_empty(1, task.side, task.side))
