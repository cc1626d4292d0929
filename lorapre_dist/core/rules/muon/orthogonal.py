"""Orthogonalise matrices that lie in pieces on several ranks, without assembling any.

Each matrix is brought into one of three forms (:func:`choose`), for which only some of its elements have to move:

    rows     whole rows on each rank, as nearly all layouts have them already; its Gram is q x q
    columns  a block of columns on each rank; its Gram is p x p
    whole    all of it on one rank, only where it is no larger than one row block of the workspace

The ranks' Grams are summed on one rank, matrix by matrix another one, which iterates there (``newton_schulz.py``) and
sends the polynomial to the others: as many bytes as an all-reduce of the Gram, and no iteration is done twice. A matrix
that this rank owns whole takes the same path without the collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...comm import Comm
from ...exchange import by_group
from ...factors import Matrix, Peers
from ...guard import Size
from ...interval import column_block
from ...linalg import gram, mm, packed, packed_numel, unpacked
from ...transfer import Rectangle, Transfer
from .newton_schulz import NewtonSchulz, iteration_dtype, polynomial

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


def cost(form: str, shape: tuple[int, int], ranks: int, segments: list[int], moved: bool) -> Cost:
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


def choose(shape: tuple[int, int], ranks: int, segments: list[int], split: str, itemsize: int, limit: int) -> str:
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
        return [Rectangle(0, p if k == owner else 0, 0, q) for k in range(size)]
    if form == "rows":
        # A row that is cut between ranks goes to where its first element lies.
        held = [(-(-start // q), -(-stop // q)) for start, stop in peers.ranges]
        blocks = held if split == "rows" else [column_block(p, size, k) for k in range(size)]
        return [Rectangle(*rows, 0, q) for rows in blocks]
    columns = peers.columns if split == "columns" else None
    return [Rectangle(0, p, *c) for c in columns or [column_block(q, size, k) for k in range(size)]]


def transient_bytes(matrix: Matrix, segments: list[int], limit: int) -> int:
    """Bytes of one matrix: the piece of m, what is sent and received, X twice, its Gram, packed, and four products.

    The same on every rank that shares the matrix.
    """
    (p, q), peers, size = matrix.interval.shape, matrix.peers, matrix.dtype.itemsize
    piece = X = p * q
    side = min(p, q)
    if peers is not None:
        form = choose((p, q), matrix.parts, segments, split_of(peers, (p, q)), size, limit)
        side = {"rows": q, "columns": p}.get(form, side)
        piece = max(stop - start for start, stop in peers.ranges)
        X = max(math.prod(target.shape) for target in targets(form, peers, (p, q), 0))
    return (2 * piece + 3 * X + 6 * side * side) * size


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
        p, q = self.matrix.interval.shape
        return self.form == "columns" or (self.form == "whole" and p < q)

    @property
    def side(self) -> int:
        """Rows of the Gram."""
        p, q = self.matrix.interval.shape
        return p if self.wide else q

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
    """Forms and owners, the same on every rank that shares a matrix: each takes the one with least to do so far."""
    for _, shared in by_group(tasks):
        load = [0.0] * shared[0].matrix.parts
        for task in shared:
            matrix = task.matrix
            peers, shape = matrix.peers, matrix.interval.shape
            assert peers is not None
            split = split_of(peers, shape)
            task.form = choose(shape, matrix.parts, settings.segments(), split, matrix.dtype.itemsize, limit)
            task.owner = load.index(min(load))
            load[task.owner] += task.side**3
            task.moved = task.form != split or (task.form == "rows" and bool(peers.cut_rows(shape)))
            task.transfer = Transfer(matrix, targets(task.form, peers, shape, task.owner))


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
        leaving[me], arriving[me] = [], []
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
