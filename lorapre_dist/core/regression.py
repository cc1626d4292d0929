"""The phases that all optimizers share: regress factors on the gradient, block by block of this rank's rows.

Notation as in ``reference.py``. Most here is local; ``exchange.py`` sums between the phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import exchange, gauge, stacks
from .comm import Comm
from .exchange import Item, Moment, Work, by_moment
from .factors import Matrix
from .interval import Segment
from .newton_schulz import gram
from .refresh import damped_inverses
from .sizes import CHUNK
from .workspace import Workspace

_T = TypeVar("_T")


@dataclass(frozen=True)
class Block:
    """Some rows of a piece: ``theta`` and ``grad`` n x c (views), ``rows`` of B, ``at`` in the piece.

    ``columns`` are those of the matrix, ``held`` the same in ``Moment.A``. ``lines`` are those of ``Work.edge`` if the
    rows are cut between ranks, else None. A stack is one block, of all there is.
    """

    theta: Tensor
    grad: Tensor
    rows: slice | EllipsisType
    columns: slice
    held: slice
    lines: slice | None
    at: int


def together(items: list[Item], workspace: Workspace, per_element: int = 0) -> Iterator[list[Item]]:
    """The items that go through a step at the same time: each stack, then each bucket of the others.

    Args:
        per_element: as in :func:`buckets`; where it is not 0, there are no stacks.
    """
    runs: list[list[int]] = []
    if items and not per_element:
        limit = workspace.block_on(items[0].theta.device)
        runs = stacks.of([x.matrix for x in items], limit, [stacks.kind(x) for x in items])
    for run in runs:
        with stacks.stacked([items[k] for k in run]) as item:
            yield [item]
    alone = _without(items, runs)
    for bucket in buckets([item.matrix for item in alone], workspace.bucket, per_element):
        yield alone[bucket]


def _without(every: list[_T], runs: list[list[int]]) -> list[_T]:
    places = {k for run in runs for k in run}
    return [one for k, one in enumerate(every) if k not in places]


def buckets(matrices: list[Matrix], limit: int, per_element: int = 0) -> Iterator[slice]:
    """Runs of consecutive matrices whose transient tensors fit in ``limit`` bytes (one matrix may exceed it).

    Ranks that share matrices also hold others that they do not share. So the list is cut by where a matrix stands among
    those of all ranks, as if each were shared: then peers have their matrices in the same buckets.

    Args:
        per_element: numbers per element of a matrix that a step keeps beside factors and Grams.
    """
    begin = 0
    places = [_place(matrix, per_element) // limit for matrix in matrices]
    for k in range(1, len(matrices) + 1):
        if k == len(matrices) or places[k] != places[begin]:
            yield slice(begin, k)
            begin = k


def _place(matrix: Matrix, per_element: int) -> int:
    """Bytes that the matrices ahead of this one would take if they were of its rank."""
    count, columns, elements = matrix.before
    return _bytes(matrix, 5 * columns, 4 * count) + per_element * elements * matrix.dtype.itemsize


def transient_bytes(matrix: Matrix) -> int:
    """Bytes of one matrix in a step: gathered factors, their gradients, packed collectives, Grams and inverses."""
    return _bytes(matrix, matrix.block_size * (1 if matrix.lends else 5 * matrix.parts), 4)


def _bytes(matrix: Matrix, columns: int, squares: int) -> int:
    ranks = matrix.ranks.values()
    return (columns * sum(ranks) + squares * sum(r * r for r in ranks)) * matrix.dtype.itemsize


def workspace_bytes(
    matrices: list[Matrix],
    workspace: Workspace,
    size_of: Callable[[Matrix], int] = transient_bytes,
    per_element: int = 0,
) -> int:
    """Bound on what a step allocates: the largest bucket, the buffers of one row block and of one batch of solves.

    Args:
        size_of: bytes of one matrix.
        per_element: as in :func:`buckets`.
    """
    if not matrices:
        return 0
    size, device = matrices[0].dtype.itemsize, matrices[0].factors["m"].B.device
    limit = workspace.block_on(device)
    places = [] if per_element else stacks.of(matrices, limit)
    alone = _without(matrices, places)
    # Each with what it copies, and how the rows of its matrices add up: a stack is one block.
    runs: list[tuple[list[Matrix], int, Any]]
    runs = [(alone[bucket], 0, max) for bucket in buckets(alone, workspace.bucket, per_element)]
    runs += [(stack, stacks.copied_bytes(stack), sum) for stack in ([matrices[k] for k in run] for run in places)]
    held = max(sum(map(size_of, run)) + copied for run, copied, _ in runs)
    # In fp64: the stacked Grams, their Cholesky factors, the inverses, and a copy that the solver makes.
    squares = [[sum(r * r for r in m.ranks.values()) for m in run] for run, _, _ in runs]
    batch = max(map(sum, squares))
    if device.type == "cpu":
        batch = min(batch, max(CHUNK, *map(max, squares)))
    shapes = [([(m.interval.rows, m.interval.shape[1]) for m in run], most) for run, _, most in runs]
    block = max(most(min(max(limit, q * size), p * q * size) for p, q in run) for run, most in shapes)
    # Four temporaries of a row block stay. Two more where the parameter is of another dtype, or five of AdamW's parts.
    blocks = 4 * block + max(2 * block, 5 * workspace.block)
    rows = max(most(min(p, max(1, limit // (q * size))) for p, q in run) for run, most in shapes)
    ranks = max(sum(m.ranks.values()) for m in matrices)

    def gauged(matrix: Matrix) -> int:  # its A, and as many rows of B as fit in a block
        r = max(matrix.ranks.values())
        return r * (matrix.block_size + min(matrix.interval.rows, max(1, limit // (r * size))))

    brought = max(most(map(gauged, run)) for run, _, most in runs)
    return held + 4 * batch * 8 + blocks + (4 * rows * ranks + brought) * size


def view(flat: Tensor, segment: Segment) -> Tensor:
    """A segment of a piece, or of a stack's pieces, as its rows x columns."""
    return flat[..., segment.offset : segment.offset + segment.numel].view(*flat.shape[:-1], segment.rows, -1)


def blocks(work: Work, workspace: Workspace, cut_only: bool = False) -> Iterator[Block]:
    """The piece in blocks sized to the cache; with ``cut_only`` those of rows that are cut between ranks."""
    interval = work.matrix.interval
    for segment in interval.segments():
        line = work.cut.get(segment.row)
        if line is None and cut_only:
            continue
        theta, grad = view(work.item.theta, segment), view(work.item.grad, segment)
        if theta.ndim == 3:
            yield Block(theta, grad, ..., slice(None), slice(None), None, 0)
            continue
        size = workspace.rows(segment.rows, segment.col_stop - segment.col, work.m.A)
        first, column = segment.row - interval.first_row, work.matrix.first_column
        columns = slice(segment.col, segment.col_stop)
        held = slice(segment.col - column, segment.col_stop - column)
        for low in range(0, segment.rows, size):
            high = min(segment.rows, low + size)
            lines = None if line is None else slice(line + low, line + high)
            at = segment.offset + low * (segment.col_stop - segment.col)
            yield Block(theta[low:high], grad[low:high], slice(first + low, first + high), columns, held, lines, at)


def invert(works: list[Work], hyper: Any) -> None:
    """Invert the damped Grams of ``A``, where it has no orthonormal rows; the cut rows' Y is solved here."""
    for moments in by_moment(works):
        inverses = damped_inverses([moment.gram for moment in moments], hyper.damping, relative=False)
        for moment, inverse in zip(moments, inverses, strict=True):
            moment.inverse = inverse
            if moment.Y.shape[0]:
                moment.Y.copy_(moment.Y @ inverse)


def edges(works: list[Work], hyper: Any, comm: Comm) -> None:
    """Sum over the ranks what a step needs of cut rows; in ``paper`` invert the Grams of ``A``."""
    if not hyper.stable:
        gauge.grams_of_A(works)
    exchange.sum_edges(works, comm, grams=not hyper.stable)
    if not hyper.stable:
        invert(works, hyper)


def gradient(work: Work, block: Block) -> Tensor:
    """A block of the gradient in the state's dtype, without what counts as 0."""
    return work.size.cleaned(block.grad.to(work.m.A.dtype))


def make_room(works: list[Work], workspace: Workspace) -> None:
    """Room for the Z of all works. The first block of a matrix held whole writes it, elsewhere blocks add to it."""
    moments = [(work.matrix, moment) for work in works for moment in work.moments]
    shapes = [
        (*moment.A.shape[:-1], moment.A.shape[-1] if matrix.lends else matrix.block_size * matrix.parts)
        for matrix, moment in moments
    ]
    sizes = [math.prod(shape) for shape in shapes]
    # Kept from step to step: what is given back to the system has to be mapped and cleared again.
    pieces = workspace.take("Z", [sum(sizes)], moments[0][1].A).split(sizes)
    for (matrix, moment), shape, piece in zip(moments, shapes, pieces, strict=True):
        moment.Z = piece.view(shape).zero_() if matrix.peers else piece.view(shape)


def row_grams(work: Work, workspace: Workspace) -> None:
    """``S = B^T B`` over the rows that are counted here, of the scaled B."""
    for moment in work.moments:
        owned = moment.factors.B[..., work.matrix.interval.first_owned :, :]
        moment.S = gram(work.size.scaled(owned), wide=False)


def regress(g: Tensor, moment: Moment, block: Block, label: str, workspace: Workspace) -> Tensor:
    """``Y = g A^+``: n x r. It is ``g A^T`` where A has orthonormal rows, else ``g A^T (A A^T + d)^-1``."""
    if block.lines is not None:
        return moment.Y[block.lines]
    shape = (*g.shape[:-1], moment.rank)
    Y = workspace.take(label, shape, moment.A)
    if moment.inverse is None:
        return torch.matmul(g, moment.A[..., block.held].mT, out=Y)
    product = torch.matmul(g, moment.A[..., block.held].mT, out=workspace.take("left", shape, moment.A))
    return torch.matmul(product, moment.inverse, out=Y)


def refresh_rows(
    work: Work, moment: Moment, block: Block, g: Tensor, Y: Tensor, gamma: float, hyper: Any, workspace: Workspace
) -> None:
    """``B <- (1 - gamma) B + gamma target Y`` on a block's rows, and its part of ``Z = B^T g``.

    Alternating refresh: A is regressed with the new B; the printed form uses the old one.
    """
    B, Z, go = moment.factors.B[block.rows], moment.Z[..., block.held], work.item.go
    so_far = 0 if work.matrix.peers is None and block.at == 0 else 1

    def add_to_Z() -> None:
        scaled = B if work.size.inverse is None else work.size.scaled(B, workspace.take("scaled", B.shape, B))
        addmm(Z, scaled.mT, g, beta=so_far)

    if not hyper.stable:
        add_to_Z()
    if hyper.target == 1:
        B.lerp_(Y, go.of(gamma, B.dtype))
    else:
        B.mul_(go.keep(1 - gamma, B.dtype)).add_(Y, alpha=gamma * hyper.target)
    if hyper.stable:
        add_to_Z()


def refresh_columns(works: list[Work], gammas: tuple[float, ...], hyper: Any, comm: Comm, workspace: Workspace) -> None:
    """``A <- (1 - gamma) A + gamma target (S + d)^-1 Z`` on this rank's columns; in ``stable`` back to the gauge."""
    for moments, gamma in zip(by_moment(works), gammas, strict=True):
        inverses = damped_inverses([moment.S for moment in moments], hyper.damping, hyper.stable)
        for work, moment, inverse in zip(works, moments, inverses, strict=True):
            go, A = work.item.go, moment.factors.A
            # S is of a B that was scaled twice, Z of one that was scaled once.
            kept, weight = go.keep(1 - gamma, A.dtype), go.of(gamma * hyper.target, A.dtype)
            addmm(A, work.size.scaled(inverse), moment.Z, beta=kept, alpha=weight)
    if hyper.stable:
        gauge.regauge(works, hyper.damping, comm, workspace)


def addmm(out: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any = 1.0, start: Tensor | None = None) -> Tensor:
    """``out <- beta start + alpha a b`` (``start``: ``out`` itself), of matrices or of stacks."""
    if isinstance(beta, Tensor):  # as it depends on whether a step is taken
        start, a, beta, alpha = (out if start is None else start).mul_(beta), a * alpha, 1.0, 1.0
    add = torch.addmm if out.ndim == 2 else torch.baddbmm
    return add(out if start is None else start, a, b, beta=beta, alpha=alpha, out=out)
