"""Adam with a factored first moment and Adafactor's second: the statistics of rows and of columns (arXiv 1804.04235).

Notation and phases as in ``adam.py``. ``v_ij = R_i C_j / mean(C)``, with ``R`` and ``C`` the decayed means of ``g^2``
over rows and columns, of which the roots are kept. A first pass over the gradient sums up the columns, and the rows
that are cut between ranks. ``R`` lies with the rows, ``C`` (q numbers) on every rank that shares the matrix.
"""

from __future__ import annotations

from typing import Any

import torch

from . import exchange, regression
from .adam import Hyper, apply, decay_rms, workspace_bytes
from .adamw import bias
from .comm import Comm
from .exchange import Item, Work
from .guard import broadcast
from .regression import Block, addmm
from .workspace import Workspace

__all__ = ["step", "workspace_bytes"]


def step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    for some in regression.together(items, workspace):
        _step(some, hyper, comm, workspace)


def _step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    works = exchange.gather(items, comm, sums=1)
    for work in works:
        work.matrix.taken.add_(work.item.go.value)
        _sums(work, workspace)
    regression.edges(works, hyper, comm)
    regression.make_room(works, workspace)
    for work in works:
        if not hyper.stable:
            regression.row_grams(work, workspace)
        _decay_columns(work, hyper)
        biases = [bias(beta, work.matrix.taken, work.item.go, work.m.A.dtype) for beta in hyper.betas]
        for block in regression.blocks(work, workspace):
            _update_block(work, block, biases, hyper, workspace)
        if hyper.stable:
            regression.row_grams(work, workspace)
    exchange.reduce(works, comm)
    regression.refresh_columns(works, hyper.gammas[:1], hyper, comm, workspace)


def _sums(work: Work, workspace: Workspace) -> None:
    """This rank's part of the columns' sums of ``g^2`` (scaled), and for cut rows of the row's, and of Y."""
    work.column_sums = torch.zeros_like(work.matrix.vectors["rms_col"])
    for block in regression.blocks(work, workspace):
        g = regression.gradient(work, block)
        scaled, w = work.size.scaled(g), workspace.take("w", g.shape, g)
        squares = torch.mul(scaled, scaled, out=w)
        work.column_sums[..., block.columns] += squares.sum(-2)
        if block.lines is not None:
            work.edge[block.lines, 0] += squares.sum(1)
            work.m.Y[block.lines] += g @ work.m.A[:, block.held].T


def _decay_columns(work: Work, hyper: Hyper) -> None:
    assert work.column_sums is not None
    norms = work.size.undone(work.column_sums.sqrt())
    decay_rms(work.matrix.vectors["rms_col"], norms, hyper.betas[1], work.matrix.interval.shape[0], work.item.go)


def _update_block(work: Work, block: Block, biases: list[Any], hyper: Hyper, workspace: Workspace) -> None:
    """One block: its rows' statistics, the update of theta, then the factors' rows."""
    matrix, size, go = work.matrix, work.size, work.item.go
    A, B = work.m.A[..., block.held], work.m.factors.B[block.rows]
    (beta1, beta2), dtype = hyper.betas, A.dtype
    bias1 = broadcast(biases[0], 2)
    g = regression.gradient(work, block)
    Y = regression.regress(g, work.m, block, "Y", workspace)
    m, w = (workspace.take(label, g.shape, A) for label in "mw")

    scaled = size.scaled(g, out=m)
    energy = torch.linalg.vector_norm(scaled, dim=-1) if block.lines is None else work.edge[block.lines, 0].sqrt()
    rows, columns = matrix.vectors["rms_row"][block.rows], matrix.vectors["rms_col"]
    decay_rms(rows, size.undone(energy), beta2, matrix.interval.shape[1], go)
    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product; nothing where no step is taken
    keep = go.of(beta1, dtype) / bias1
    left = torch.mul(B, keep, out=workspace.take("left", B.shape, A)).sub_(Y, alpha=hyper.residual)
    addmm(torch.mul(g, (1 - beta1) / bias1 + hyper.residual, out=m), left, A, beta=1)

    tiny = torch.finfo(dtype).tiny
    most = columns.amax(-1, keepdim=True).clamp_min(tiny)
    level = (most * (columns / most).square_().mean(-1, keepdim=True).sqrt_()).clamp_min_(tiny)
    down = rows * broadcast(biases[1], 1) ** -0.5 / level
    torch.mul(down[..., None], columns[..., None, block.columns], out=w).add_(max(hyper.eps, tiny))
    apply(block.theta, m, w, hyper, go)
    regression.refresh_rows(work, work.m, block, g, Y, hyper.gammas[0], hyper, workspace)
