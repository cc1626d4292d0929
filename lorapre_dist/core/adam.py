"""LoRA-Pre (Adam form) on row intervals: a handful of local phases with collectives between them.

Notation as in ``reference.py``; ``At`` is ``A`` transposed (q x r). A rank holds rows ``R_k`` of ``B`` and a block
of the rows of ``At``. Per matrix and moment:

    gather   At whole, from its blocks
    edge     sums over rows cut between ranks, and the Gram ``A A^T``: one small all-reduce
    local    block by block of rows: update theta, Y = g At (A A^T + d)^-1, new B[R_k], Z = g^T B
    reduce   Z to its blocks, S = B^T B over rows
    refresh  At <- (1 - gamma) At + gamma Z (S + d)^-1 on this rank's block

A matrix that one rank owns whole takes the same path without the collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import exchange, regression
from .comm import Comm
from .exchange import Item, Work
from .factors import Matrix
from .regression import Block, addmm
from .workspace import Workspace


@dataclass(frozen=True)
class Hyper:
    """Settings of one parameter group at one step; see :class:`lorapre_dist.config.LoRAPreConfig`."""

    lr: float
    betas: tuple[float, float]
    gammas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    residual: float
    damping: float
    max_update: float
    stable: bool
    target: float = 1.0


def step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    for some in regression.together(items, workspace):
        _step(some, hyper, comm, workspace)


def workspace_bytes(matrices: list[Matrix], workspace: Workspace) -> int:
    """Bound on what a step allocates for itself."""
    return regression.workspace_bytes(matrices, workspace)


def _step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    for item in items:
        item.matrix.step += 1
    works = exchange.gather(items, comm, sums=2)
    regression.grams_of_A(works)
    for work in works:
        _edge_sums(work, hyper, workspace)
    exchange.sum_edges(works, comm)
    regression.invert(works, hyper)
    for work in works:
        regression.begin(work, hyper, workspace)
        for block in regression.blocks(work, workspace):
            _update_block(work, block, hyper, workspace)
        if hyper.stable:
            regression.row_grams(work)
    exchange.reduce(works, comm)
    regression.refresh_columns(works, hyper.gammas, hyper)


def _edge_sums(work: Work, hyper: Hyper, workspace: Workspace) -> None:
    """This rank's part of the sums over cut rows: ``sum g^2``, ``sum w`` and both Y."""
    beta2 = hyper.betas[1]
    for block in regression.blocks(work, workspace, cut_only=True):
        g = block.grad.to(work.m.At.dtype)
        u = work.v.factors.B[block.rows] @ work.v.At[block.held].T
        work.edge[block.lines, 0] += g.square().sum(1)
        work.edge[block.lines, 1] += (beta2 * u.square() + (1 - beta2) * g.square()).sum(1)
        work.m.Y[block.lines] += g @ work.m.At[block.held]
        work.v.Y[block.lines] += g.abs() @ work.v.At[block.held]


def _update_block(work: Work, block: Block, hyper: Hyper, workspace: Workspace) -> None:
    """One block: the update of theta, then both moments' rows."""
    matrix = work.matrix
    At, vAt = work.m.At[block.held], work.v.At[block.held]
    B, vB = work.m.factors.B[block.rows], work.v.factors.B[block.rows]
    beta1, beta2 = hyper.betas
    bias1, bias2 = 1 - beta1**matrix.step, 1 - beta2**matrix.step
    m, w, a = (workspace.take(label, block.grad.shape, At) for label in "mwa")
    g = block.grad.to(At.dtype)
    torch.abs(g, out=a)

    # Y and Yv: regression of g and |g| on the old A.
    Y = regression.regress(g, work.m, block, "Y", workspace)
    Yv = regression.regress(a, work.v, block, "Yv", workspace)

    # w = beta2 (vB vA)^2 + (1 - beta2) g^2
    addmm(w, vB, vAt.mT, beta=0, alpha=math.sqrt(beta2))
    w.mul_(w).addcmul_(g, g, value=1 - beta2)
    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product.
    left = torch.mul(B, beta1 / bias1, out=workspace.take("left", B.shape, At))
    left.add_(Y, alpha=-hyper.residual)
    fresh = (1 - beta1) / bias1 + hyper.residual
    if "v_row" in matrix.vectors:
        # m_hat / (sqrt(f w) + floor) = m_hat / sqrt(f) / (sqrt(w) + floor / sqrt(f)): rows of the factor are scaled,
        # not those of the product.
        edge = None if block.lines is None else work.edge[block.lines]
        energy = matrix.vectors["v_row"][block.rows]
        shrink, floor = _calibrate(w, g, edge, energy, hyper, bias2, matrix.interval.shape[1])
        addmm(torch.mul(g, shrink * fresh, out=m), left.mul_(shrink), At.mT, beta=1)
        _sqrt_(w).add_(floor)
    else:
        addmm(m, left, At.mT, beta=fresh, start=g)
        _sqrt_(w.div_(bias2)).add_(hyper.eps)
    apply(block.theta, m, w, hyper)

    regression.refresh_rows(work, work.m, block, g, Y, hyper.gammas[0], hyper)
    regression.refresh_rows(work, work.v, block, a, Yv, hyper.gammas[1], hyper)


def _calibrate(
    w: Tensor, g: Tensor, edge: Tensor | None, energy: Tensor, hyper: Hyper, bias2: float, q: int
) -> tuple[Tensor, Tensor]:
    """Update the row energies ``s``; ``1 / sqrt(f)`` and ``floor / sqrt(f)`` (n x 1) of ``sqrt(v_hat) + eps``.

    ``v_hat = f w`` with ``f = s / bias2 / mean(w)``, so that the denominator is ``sqrt(f w) + eps``; in a row where all
    of ``w`` is 0 it is ``sqrt(s / bias2) + eps``.
    """
    sum_g2 = edge[:, 0] if edge is not None else torch.linalg.vector_norm(g, dim=-1).square_()
    sum_w = edge[:, 1] if edge is not None else w.sum(-1)
    energy.mul_(hyper.betas[1]).add_(sum_g2, alpha=(1 - hyper.betas[1]) / q)
    level = energy / bias2
    some = sum_w > 0
    shrink = (sum_w / level.clamp_min(torch.finfo(level.dtype).tiny)).div_(q).sqrt_()
    shrink = torch.where(some, shrink, torch.ones_like(level))
    floor = torch.where(some, torch.zeros_like(level), level.sqrt()).add_(hyper.eps).mul_(shrink)
    return shrink[..., None], floor[..., None]


def _sqrt_(w: Tensor) -> Tensor:
    """Square root, in place.

    On a CPU as ``1 / w^-0.5``, which is right at 0 and infinity as well: two vectorised passes of torch's own,
    in half the time of its ``sqrt``, which calls a vendor's library.
    """
    return w.pow_(-0.5).reciprocal_() if w.device.type == "cpu" else w.sqrt_()


def apply(theta: Tensor, m: Tensor, denom: Tensor, hyper: Hyper) -> None:
    """``theta -= lr (scale m / denom + weight_decay theta)``, the quotient clipped; ``m`` is overwritten."""
    wide = theta if theta.dtype == m.dtype else theta.to(m.dtype)
    if hyper.weight_decay:
        wide.mul_(1 - hyper.lr * hyper.weight_decay)
    if math.isfinite(hyper.max_update):
        m.div_(denom).clamp_(-hyper.max_update, hyper.max_update)
        wide.add_(m, alpha=-hyper.lr * hyper.scale)
    else:
        wide.addcdiv_(m, denom, value=-hyper.lr * hyper.scale)
    if wide is not theta:
        theta.copy_(wide)
