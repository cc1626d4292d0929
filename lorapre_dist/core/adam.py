"""LoRA-Pre (Adam form) on row intervals: a handful of local phases with collectives between them.

Notation as in ``reference.py``. A rank holds rows ``R_k`` of ``B`` and a block of the columns of ``A``. Per matrix and
moment:

    gather   A whole, from its blocks, and how large the gradient is
    edge     sums over rows cut between ranks: one small all-reduce (in ``paper`` with the Gram ``A A^T``)
    local    block by block of rows: update theta, Y = g A^+, new B[R_k], Z = B^T g
    reduce   Z to its blocks, S = B^T B over rows
    refresh  A <- (1 - gamma) A + gamma (S + d)^-1 Z on this rank's block
    gauge    A A^T over blocks; A <- L^-1 A, B <- B L, so that A has orthonormal rows and A^+ is A^T (not in ``paper``)

A matrix that one rank owns whole takes the same path without the collectives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import exchange, regression
from .adamw import bias
from .comm import Comm
from .exchange import Item, Work
from .guard import Go, broadcast
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
    works = exchange.gather(items, comm, sums=2)
    for work in works:
        work.matrix.taken.add_(work.item.go.value)
        _edge_sums(work, hyper, workspace)
    regression.edges(works, hyper, comm)
    regression.make_room(works, workspace)
    for work in works:
        if not hyper.stable:
            regression.row_grams(work, workspace)
        biases = [bias(beta, work.matrix.taken, work.item.go, work.m.A.dtype) for beta in hyper.betas]
        for block in regression.blocks(work, workspace):
            _update_block(work, block, biases, hyper, workspace)
        if hyper.stable:
            regression.row_grams(work, workspace)
    exchange.reduce(works, comm)
    regression.refresh_columns(works, hyper.gammas, hyper, comm, workspace)


def _edge_sums(work: Work, hyper: Hyper, workspace: Workspace) -> None:
    """This rank's part of the sums over cut rows: ``sum g^2``, ``sum w`` and both Y; squares are of scaled numbers."""
    beta2 = hyper.betas[1]
    for block in regression.blocks(work, workspace, cut_only=True):
        g = regression.gradient(work, block)
        squares = work.size.scaled(g).square()
        u = work.size.scaled(work.v.factors.B[block.rows]) @ work.v.A[:, block.held]
        work.edge[block.lines, 0] += squares.sum(1)
        work.edge[block.lines, 1] += (beta2 * u.square() + (1 - beta2) * squares).sum(1)
        work.m.Y[block.lines] += g @ work.m.A[:, block.held].T
        work.v.Y[block.lines] += g.abs() @ work.v.A[:, block.held].T


def _update_block(work: Work, block: Block, biases: list[Any], hyper: Hyper, workspace: Workspace) -> None:
    """One block: the update of theta, then both moments' rows. ``biases``: ``1 - beta^t`` of both."""
    matrix, size, go = work.matrix, work.size, work.item.go
    A, vA = work.m.A[..., block.held], work.v.A[..., block.held]
    B, vB = work.m.factors.B[block.rows], work.v.factors.B[block.rows]
    (beta1, beta2), dtype = hyper.betas, A.dtype
    bias1, bias2 = (broadcast(bias, 2) for bias in biases)
    m, w, a = (workspace.take(label, block.grad.shape, A) for label in "mwa")
    g = regression.gradient(work, block)
    torch.abs(g, out=a)

    # Y and Yv: regression of g and |g| on the old A.
    Y = regression.regress(g, work.m, block, "Y", workspace)
    Yv = regression.regress(a, work.v, block, "Yv", workspace)

    # w = beta2 (vB vA)^2 + (1 - beta2) g^2, of scaled numbers
    addmm(w, size.scaled(vB), vA, beta=0, alpha=math.sqrt(beta2))
    scaled = size.scaled(g, out=m)
    w.mul_(w).addcmul_(scaled, scaled, value=1 - beta2)
    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product; nothing where no step is taken
    left, keep = workspace.take("left", B.shape, A), go.of(beta1, dtype) / bias1
    fresh = (1 - beta1) / bias1 + hyper.residual
    eps = max(hyper.eps, torch.finfo(dtype).tiny)
    if "rms_row" in matrix.vectors:
        # m_hat / (sqrt(f w) + eps) = m_hat / sqrt(f) / (sqrt(w) + eps / sqrt(f)): rows of the factor are scaled,
        # not those of the product.
        edge = None if block.lines is None else work.edge[block.lines]
        row = matrix.vectors["rms_row"][block.rows]
        shrink, floor = _calibrate(work, w, scaled, edge, row, hyper, broadcast(biases[1], 1))
        torch.mul(B, shrink * keep, out=left).addcmul_(Y, shrink, value=-hyper.residual)
        addmm(torch.mul(g, shrink * fresh, out=m), left, A, beta=1)
        _root_plus(w, floor)
    else:
        torch.mul(B, keep, out=left).sub_(Y, alpha=hyper.residual)
        addmm(torch.mul(g, fresh, out=m), left, A, beta=1)
        _root_plus(w.div_(bias2), torch.full((), eps, dtype=dtype, device=w.device))
    apply(block.theta, m, w, hyper, go)

    regression.refresh_rows(work, work.m, block, g, Y, hyper.gammas[0], hyper, workspace)
    regression.refresh_rows(work, work.v, block, a, Yv, hyper.gammas[1], hyper, workspace)


def _calibrate(
    work: Work, w: Tensor, g: Tensor, edge: Tensor | None, row: Tensor, hyper: Hyper, bias2: Any
) -> tuple[Tensor, Tensor]:
    """Update the rows' root mean squares ``s``; ``1 / sqrt(f)`` and ``eps / sqrt(f)`` (n x 1) of ``sqrt(v_hat) + eps``.

    ``v_hat = f w`` with ``f = s^2 / bias2 / mean(w)``, so that the denominator is ``sqrt(f w) + eps``; in a row where
    all of ``w`` is 0 it is ``s / sqrt(bias2) + eps``. ``w`` (n x c), ``g`` (n x c) and ``edge`` are of scaled numbers,
    ``s`` and what is returned are not.
    """
    q = work.matrix.interval.shape[1]
    norm_g = edge[:, 0].sqrt() if edge is not None else torch.linalg.vector_norm(g, dim=-1)
    sum_w = edge[:, 1] if edge is not None else w.sum(-1)
    decay_rms(row, work.size.undone(norm_g), hyper.betas[1], q, work.item.go)
    # Where all of w is 0, any positive number may stand for 1 / sqrt(f), as it scales numerator and denominator. With
    # this one s / sqrt(bias2) / sqrt(f) is sqrt(tiny / q), which is nothing in all other rows.
    tiny = torch.finfo(row.dtype).tiny
    shrink = ((sum_w + tiny) / q).sqrt_() / (row * bias2**-0.5).clamp_min_(tiny)
    floor = (shrink * hyper.eps).add_(math.sqrt(tiny / q))
    return shrink[..., None], floor[..., None]


def decay_rms(rms: Tensor, norm: Tensor, beta: float, count: int, go: Go) -> None:
    """``rms^2 <- beta rms^2 + (1 - beta) norm^2 / count``, in place, without forming a square that is no number."""
    kept, fresh = go.keep(math.sqrt(beta), rms.dtype), go.of(math.sqrt((1 - beta) / count), rms.dtype)
    torch.hypot(rms * kept, norm * fresh, out=rms)


def _root_plus(w: Tensor, floor: Tensor) -> Tensor:
    """``w <- sqrt(w) + floor``, in place.

    On a CPU as ``1 / w^-0.5``, which is right at 0 and infinity as well: two vectorised passes of torch's own,
    in half the time of its ``sqrt``, which calls a vendor's library.
    """
    if w.device.type != "cpu":
        return w.sqrt_().add_(floor)
    return torch.addcdiv(floor, w.new_ones(w.shape[-1]), w.pow_(-0.5), out=w)


def apply(theta: Tensor, m: Tensor, denom: Tensor, hyper: Hyper, go: Go) -> None:
    """``theta -= lr (scale m / denom + weight_decay theta)``, the quotient clipped; ``m`` is overwritten."""
    wide = theta if theta.dtype == m.dtype else theta.to(m.dtype)
    if hyper.weight_decay:
        wide.mul_(go.keep(1 - hyper.lr * hyper.weight_decay, m.dtype))
    if math.isfinite(hyper.max_update):
        m.div_(denom).clamp_(-hyper.max_update, hyper.max_update)
        wide.add_(m, alpha=-hyper.lr * hyper.scale)
    else:
        wide.addcdiv_(m, denom, value=-hyper.lr * hyper.scale)
    if wide is not theta:
        theta.copy_(wide)
