"""Optimizers with one factored moment, on row intervals: Muon, SGD with momentum, Lion. They differ in the update.

Notation and phases as in ``adam.py``. The update's direction is ``u = keep B A + fresh g + residual (g - Y A)``, from
the old factors and the fresh gradient; then ``theta -= lr * u``, or of its sign, or of its orthogonalisation. For the
latter ``u`` is kept for all of a bucket's matrices at once, as large as this rank's pieces of them; for the others a
row block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import exchange, orthogonal, regression
from .comm import Comm
from .exchange import Item, Work
from .factors import Matrix
from .guard import Go
from .newton_schulz import NewtonSchulz
from .regression import Block, addmm
from .workspace import Workspace


@dataclass(frozen=True)
class Hyper:
    """Settings of one parameter group at one step.

    Attributes:
        lr: of the update, by shape of the matrix.
        decay: ``theta`` is multiplied by 1 minus this.
        keep, fresh, residual: weights in ``u``, see above.
        gamma, target: ``B A`` regresses at this rate on ``target * g``.
        damping, stable: see :class:`lorapre_dist.config.LowRankConfig`.
        sign: the update is that of each element of ``u``.
        orthogonal: the update is ``u`` made orthogonal so; None if it is not.
    """

    lr: Callable[[tuple[int, int]], float]
    decay: float
    keep: float
    fresh: float
    residual: float
    gamma: float
    target: float
    damping: float
    stable: bool
    sign: bool = False
    orthogonal: NewtonSchulz | None = None


def step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    per_element = orthogonal.PER_ELEMENT if hyper.orthogonal else 0
    for some in regression.together(items, workspace, per_element):
        _step(some, hyper, comm, workspace)


def workspace_bytes(matrices: list[Matrix], workspace: Workspace, settings: NewtonSchulz | None = None) -> int:
    """Bound on what a step allocates for itself, the pieces of ``u`` included if they are made orthogonal."""
    if settings is None:
        return regression.workspace_bytes(matrices, workspace)
    segments = settings.segments()

    def size_of(matrix: Matrix) -> int:
        limit = workspace.block_on(matrix.factors["m"].B.device)
        return regression.transient_bytes(matrix) + orthogonal.transient_bytes(matrix, segments, limit)

    return regression.workspace_bytes(matrices, workspace, size_of, orthogonal.PER_ELEMENT)


def _step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    works = exchange.gather(items, comm, sums=0)
    for work in works:
        work.matrix.taken.add_(work.item.go.value)
        for block in regression.blocks(work, workspace, cut_only=True):
            work.m.Y[block.lines] += regression.gradient(work, block) @ work.m.A[:, block.held].T
    regression.edges(works, hyper, comm)
    regression.make_room(works, workspace)
    pieces = []
    for work in works:
        if not hyper.stable:
            regression.row_grams(work, workspace)
        u = work.m.A.new_empty(work.item.theta.numel()) if hyper.orthogonal else None
        for block in regression.blocks(work, workspace):
            _block(work, block, u, hyper, workspace)
        if hyper.stable:
            regression.row_grams(work, workspace)
        if u is not None:
            pieces.append((work.matrix, u, work.size))
    exchange.reduce(works, comm)
    regression.refresh_columns(works, (hyper.gamma,), hyper, comm, workspace)
    if hyper.orthogonal:
        limit = workspace.block_on(items[0].theta.device)
        orthogonal.orthogonalise(pieces, hyper.orthogonal, comm, limit, workspace.bucket)
        for item, (matrix, u, _) in zip(items, pieces, strict=True):
            _apply(item.theta, u, hyper.lr(matrix.interval.shape), hyper, item.go)


def _block(work: Work, block: Block, u: Tensor | None, hyper: Hyper, workspace: Workspace) -> None:
    """One block: its rows of ``u``, the update unless it has to wait for all of ``u``, then the factors' rows."""
    A, B, go = work.m.A[..., block.held], work.m.factors.B[block.rows], work.item.go
    g = regression.gradient(work, block)
    Y = regression.regress(g, work.m, block, "Y", workspace)
    # keep B A + fresh g + residual (g - Y A), as one product; nothing where no step is taken
    left = torch.mul(B, go.of(hyper.keep, B.dtype), out=workspace.take("left", B.shape, A))
    left.sub_(Y, alpha=hyper.residual)
    out = workspace.take("m", g.shape, A) if u is None else u[block.at : block.at + g.numel()].view(g.shape)
    direction = addmm(out, left, A, beta=hyper.fresh + hyper.residual, start=g)
    if u is None:
        direction = direction.sign_() if hyper.sign else direction
        _apply(block.theta, direction, hyper.lr(work.matrix.interval.shape), hyper, go)
    regression.refresh_rows(work, work.m, block, g, Y, hyper.gamma, hyper, workspace)


def _apply(theta: Tensor, update: Tensor, lr: float, hyper: Hyper, go: Go) -> None:
    wide = theta if theta.dtype == update.dtype else theta.to(update.dtype)
    wide.mul_(go.keep(1 - hyper.decay, wide.dtype)).add_(update, alpha=-lr)
    if wide is not theta:
        theta.copy_(wide)
