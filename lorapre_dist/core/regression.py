"""The phases that all optimizers share: regress factors on the gradient, block by block of this rank's rows.

Notation as in ``reference.py``. All here is local; ``exchange.py`` sums between the phases. Every tensor is that of a
stack of k matrices: ``theta`` and ``g`` k x n x c, ``B`` k x n x r, ``A`` k x r x c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .exchange import Moment, Work
from .interval import Segment
from .linalg import addmm, gram, mm
from .workspace import Workspace


@dataclass(frozen=True)
class Regression:
    """How factors follow gradients: ``B A`` regresses at the rates ``gammas`` (of each moment) on ``target * g``.

    For ``damping`` and ``stable`` see :class:`lorapre_dist.config.LowRankConfig`.
    """

    gammas: tuple[float, ...]
    damping: float
    stable: bool
    target: float = 1.0


@dataclass(frozen=True)
class Block:
    """Some rows of the pieces: ``theta`` and ``grad`` k x n x c (views), ``rows`` of B, ``at`` in the pieces.

    ``columns`` are those of the matrix, ``held`` the same in ``Moment.A``. ``lines`` are those of ``Work.edge`` if the
    rows are cut between ranks, else None.
    """

    theta: Tensor
    grad: Tensor
    rows: slice
    columns: slice
    held: slice
    lines: slice | None
    at: int


def blocks(work: Work, workspace: Workspace, cut_only: bool = False) -> Iterator[Block]:
    """The pieces in blocks sized to the cache; with ``cut_only`` those of rows that are cut between ranks."""
    interval, k = work.matrix.interval, work.item.theta.shape[0]
    for segment in interval.segments:
        line = work.cut.get(segment.row)
        if line is None and cut_only:
            continue
        theta, grad = _view(work.item.theta, segment), _view(work.item.grad, segment)
        width = segment.col_stop - segment.col
        size = workspace.rows(segment.rows, width, work.m.factors.A) if k == 1 else segment.rows
        first, column = segment.row - interval.first_row, work.matrix.first_column
        columns = slice(segment.col, segment.col_stop)
        held = slice(segment.col - column, segment.col_stop - column)
        for low in range(0, segment.rows, size):
            high = min(segment.rows, low + size)
            lines = None if line is None else slice(line + low, line + high)
            rows, at = slice(first + low, first + high), segment.offset + low * width
            yield Block(theta[:, low:high], grad[:, low:high], rows, columns, held, lines, at)


def _view(flat: Tensor, segment: Segment) -> Tensor:
    """A segment of some pieces (k x n) as its rows x columns."""
    return flat[:, segment.offset : segment.offset + segment.numel].view(flat.shape[0], segment.rows, -1)


def gradient(work: Work, block: Block) -> Tensor:
    """A block of the gradient in the state's dtype, without what counts as 0."""
    return work.size.cleaned(block.grad.to(work.matrix.dtype))


def make_room(works: list[Work], workspace: Workspace, label: str | None) -> None:
    """Room for the Z of all works, by a label. A first block of whole rows writes it, others add to it.

    Without a label it is memory of its own, for work that goes on when the workspace is used again.
    """
    moments = [(work.matrix, moment) for work in works for moment in work.moments]
    shapes = [
        (*moment.A.shape[:2], moment.A.shape[-1] if matrix.lends else matrix.block_size * matrix.parts)
        for matrix, moment in moments
    ]
    sizes = [math.prod(shape) for shape in shapes]
    # Kept from step to step: what is given back to the system has to be mapped and cleared again.
    like = moments[0][1].A
    room = like.new_empty(sum(sizes)) if label is None else workspace.take(label, [sum(sizes)], like)
    pieces = room.split(sizes)
    for (matrix, moment), shape, piece in zip(moments, shapes, pieces, strict=True):
        moment.Z = piece.view(shape)
        if not matrix.starts_whole:
            moment.Z.zero_()


def row_grams(work: Work) -> None:
    """``S = B^T B`` over the rows that are counted here, of the scaled B."""
    for moment in work.moments:
        owned = moment.factors.B[:, work.matrix.interval.first_owned :]
        moment.S = gram(work.size.scaled(owned), wide=False)


def regress(g: Tensor, moment: Moment, block: Block, label: str, workspace: Workspace) -> Tensor:
    """``Y = g A^+``: k x n x r. It is ``g A^T`` where A has orthonormal rows, else ``g A^T (A A^T + d)^-1``."""
    if block.lines is not None:
        return moment.Y[:, block.lines]
    shape = (*g.shape[:2], moment.A.shape[-2])
    Y = workspace.take(label, shape, moment.A)
    if moment.inverse is None:
        return mm(g, moment.A[..., block.held].mT, out=Y)
    product = mm(g, moment.A[..., block.held].mT, out=workspace.take("left", shape, moment.A))
    return mm(product, moment.inverse, out=Y)


def refresh_rows(work: Work, k: int, block: Block, g: Tensor, Y: Tensor, how: Regression, workspace: Workspace) -> None:
    """``B <- (1 - gamma) B + gamma target Y`` of moment ``k`` on a block's rows, and its part of ``Z = B^T g``.

    Alternating refresh: A is regressed with the new B; the printed form uses the old one.
    """
    moment, gamma, go = work.moments[k], how.gammas[k], work.item.go
    B = moment.factors.B[:, block.rows]

    def with_rows() -> None:
        scaled = B if work.size.inverse is None else work.size.scaled(B, workspace.take("scaled", B.shape, B))
        add_to_Z(work, moment, block, scaled, g)

    if not how.stable:
        with_rows()
    if how.target == 1:
        B.lerp_(Y, go.of(gamma, B.dtype))
    else:
        B.mul_(go.keep(1 - gamma, B.dtype)).add_(Y, alpha=gamma * how.target)
    if how.stable:
        with_rows()


def add_to_Z(work: Work, moment: Moment, block: Block, scaled: Tensor, g: Tensor) -> None:
    """A block's part of ``Z = B^T g``, of its scaled rows."""
    so_far = 0 if block.at == 0 and work.matrix.starts_whole else 1
    addmm(moment.Z[..., block.held], scaled.mT, g, beta=so_far)


def refresh_columns(works: list[Work], inverses: list[list[Tensor]], how: Regression) -> None:
    """``A <- (1 - gamma) A + gamma target (S + d)^-1 Z`` on this rank's columns."""
    for work, some in zip(works, inverses, strict=True):
        for moment, gamma, inverse in zip(work.moments, how.gammas, some, strict=True):
            go, A = work.item.go, moment.factors.A
            # S is of a B that was scaled twice, Z of one that was scaled once.
            kept, weight = go.keep(1 - gamma, A.dtype), go.of(gamma * how.target, A.dtype)
            addmm(A, work.size.scaled(inverse), moment.Z, beta=kept, alpha=weight)
