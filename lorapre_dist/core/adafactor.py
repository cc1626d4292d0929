"""Adam with a factored first moment and Adafactor's second: the statistics of rows and of columns (arXiv 1804.04235).

Notation and phases as in ``adam.py``. ``v_ij = R_i C_j / mean(C)``, with ``R`` and ``C`` the decayed means of ``g^2``
over rows and columns. A first pass over the gradient sums up the columns, and the rows that are cut between ranks; the
sums ride on the all-reduce of the Grams. ``R`` lies with the rows, ``C`` (q numbers) on every rank that shares the
matrix.
"""

from __future__ import annotations

import torch

from . import exchange, regression
from .adam import Hyper, apply, workspace_bytes
from .comm import Comm
from .exchange import Item, Work
from .regression import Block, addmm
from .workspace import Workspace

__all__ = ["step", "workspace_bytes"]


def step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    for some in regression.together(items, workspace):
        _step(some, hyper, comm, workspace)


def _step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    for item in items:
        item.matrix.step += 1
    works = exchange.gather(items, comm, sums=1)
    regression.grams_of_A(works)
    for work in works:
        _sums(work, workspace)
    exchange.sum_edges(works, comm)
    regression.invert(works, hyper)
    regression.make_room(works, workspace)
    for work in works:
        regression.begin(work, hyper, workspace)
        _decay_columns(work, hyper)
        for block in regression.blocks(work, workspace):
            _update_block(work, block, hyper, workspace)
        if hyper.stable:
            regression.row_grams(work)
    exchange.reduce(works, comm)
    regression.refresh_columns(works, hyper.gammas[:1], hyper)


def _sums(work: Work, workspace: Workspace) -> None:
    """This rank's part of the columns' sums of ``g^2``, and for cut rows of the row's, and of Y."""
    work.column_sums = torch.zeros_like(work.matrix.vectors["v_col"])
    for block in regression.blocks(work, workspace):
        g = block.grad.to(work.m.A.dtype)
        squares = torch.mul(g, g, out=workspace.take("w", g.shape, g))
        work.column_sums[..., block.columns] += squares.sum(-2)
        if block.lines is not None:
            work.edge[block.lines, 0] += squares.sum(1)
            work.m.Y[block.lines] += g @ work.m.A[:, block.held].T


def _decay_columns(work: Work, hyper: Hyper) -> None:
    beta2 = hyper.betas[1]
    assert work.column_sums is not None
    columns = work.matrix.vectors["v_col"]
    columns.mul_(beta2).add_(work.column_sums, alpha=(1 - beta2) / work.matrix.interval.shape[0])


def _update_block(work: Work, block: Block, hyper: Hyper, workspace: Workspace) -> None:
    """One block: its rows' statistics, the update of theta, then the factors' rows."""
    matrix, A, B = work.matrix, work.m.A[..., block.held], work.m.factors.B[block.rows]
    beta1, beta2 = hyper.betas
    bias1, bias2 = 1 - beta1**matrix.step, 1 - beta2**matrix.step
    g = block.grad.to(A.dtype)
    Y = regression.regress(g, work.m, block, "Y", workspace)
    m, w = (workspace.take(label, g.shape, A) for label in "mw")
    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product.
    left = torch.mul(B, beta1 / bias1, out=workspace.take("left", B.shape, A))
    left.sub_(Y, alpha=hyper.residual)
    addmm(m, left, A, beta=(1 - beta1) / bias1 + hyper.residual, start=g)

    energy = torch.linalg.vector_norm(g, dim=-1).square_() if block.lines is None else work.edge[block.lines, 0]
    rows, columns = matrix.vectors["v_row"][block.rows], matrix.vectors["v_col"]
    rows.mul_(beta2).add_(energy, alpha=(1 - beta2) / matrix.interval.shape[1])
    level = columns.mean(-1, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
    down, across = (rows / (bias2 * level)).sqrt_(), columns[..., block.columns].sqrt()
    torch.mul(down[..., None], across[..., None, :], out=w).add_(hyper.eps)
    apply(block.theta, m, w, hyper)
    regression.refresh_rows(work, work.m, block, g, Y, hyper.gammas[0], hyper)
