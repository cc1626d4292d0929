"""LoRA-Pre (Adam form) on row intervals: a handful of local phases with collectives between them.

Notation as in ``reference.py``. A rank holds rows ``R_k`` of ``B`` and a block of the columns of ``A``. Per matrix and
moment:

    gather   A whole, from its blocks
    edge     sums over rows cut between ranks, and the Gram ``A A^T``: one small all-reduce
    local    block by block of rows: update theta, Y = g A^T (A A^T + d)^-1, new B[R_k], Z = B^T g
    reduce   Z to its blocks, S = B^T B over rows
    refresh  A <- (1 - gamma) A + gamma (S + d)^-1 Z on this rank's block

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
from .regression import Block, addmm, workspace_bytes
from .workspace import Workspace

__all__ = ["Hyper", "apply", "step", "workspace_bytes"]


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


def _step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    for item in items:
        item.matrix.step += 1
    works = exchange.gather(items, comm, sums=2)
    regression.grams_of_A(works)
    for work in works:
        _edge_sums(work, hyper, workspace)
    exchange.sum_edges(works, comm)
    regression.invert(works, hyper)
    regression.make_room(works, workspace)
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
        g = block.grad.to(work.m.A.dtype)
        u = work.v.factors.B[block.rows] @ work.v.A[:, block.held]
        work.edge[block.lines, 0] += g.square().sum(1)
        work.edge[block.lines, 1] += (beta2 * u.square() + (1 - beta2) * g.square()).sum(1)
        work.m.Y[block.lines] += g @ work.m.A[:, block.held].T
        work.v.Y[block.lines] += g.abs() @ work.v.A[:, block.held].T


def _update_block(work: Work, block: Block, hyper: Hyper, workspace: Workspace) -> None:
    """One block: the update of theta, then both moments' rows."""
    matrix = work.matrix
    A, vA = work.m.A[..., block.held], work.v.A[..., block.held]
    B, vB = work.m.factors.B[block.rows], work.v.factors.B[block.rows]
    beta1, beta2 = hyper.betas
    bias1, bias2 = 1 - beta1**matrix.step, 1 - beta2**matrix.step
    m, w, a = (workspace.take(label, block.grad.shape, A) for label in "mwa")
    g = block.grad.to(A.dtype)
    torch.abs(g, out=a)

    # Y and Yv: regression of g and |g| on the old A.
    Y = regression.regress(g, work.m, block, "Y", workspace)
    Yv = regression.regress(a, work.v, block, "Yv", workspace)

    # w = beta2 (vB vA)^2 + (1 - beta2) g^2
    addmm(w, vB, vA, beta=0, alpha=math.sqrt(beta2))
    w.mul_(w).addcmul_(g, g, value=1 - beta2)
    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product.
    left, keep = workspace.take("left", B.shape, A), beta1 / bias1
    fresh = (1 - beta1) / bias1 + hyper.residual
    if "v_row" in matrix.vectors:
        # m_hat / (sqrt(f w) + floor) = m_hat / sqrt(f) / (sqrt(w) + floor / sqrt(f)): rows of the factor are scaled,
        # not those of the product.
        edge = None if block.lines is None else work.edge[block.lines]
        energy = matrix.vectors["v_row"][block.rows]
        shrink, floor = _calibrate(w, g, edge, energy, hyper, bias2, matrix.interval.shape[1])
        torch.mul(B, shrink * keep, out=left).addcmul_(Y, shrink, value=-hyper.residual)
        addmm(torch.mul(g, shrink * fresh, out=m), left, A, beta=1)
        _root_plus(w, floor)
    else:
        torch.mul(B, keep, out=left).sub_(Y, alpha=hyper.residual)
        addmm(m, left, A, beta=fresh, start=g)
        _root_plus(w.div_(bias2), w.new_tensor(hyper.eps))
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
    # Where all of w is 0, any positive number may stand for 1 / sqrt(f), as it scales numerator and denominator. With
    # this one sqrt(s / bias2) / sqrt(f) is sqrt(tiny / q), which is nothing in all other rows.
    tiny = torch.finfo(energy.dtype).tiny
    shrink = ((sum_w + tiny) / (energy * (q / bias2)).add_(tiny)).sqrt_()
    floor = (shrink * hyper.eps).add_(math.sqrt(tiny / q))
    return shrink[..., None], floor[..., None]


def _root_plus(w: Tensor, floor: Tensor) -> Tensor:
    """``w <- sqrt(w) + floor``, in place.

    On a CPU as ``1 / w^-0.5``, which is right at 0 and infinity as well: two vectorised passes of torch's own,
    in half the time of its ``sqrt``, which calls a vendor's library.
    """
    if w.device.type != "cpu":
        return w.sqrt_().add_(floor)
    return torch.addcdiv(floor, w.new_ones(w.shape[-1]), w.pow_(-0.5), out=w)


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
