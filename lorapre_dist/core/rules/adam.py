"""LoRA-Pre's Adam: both moments factored. Its rule in a step (``step.py``); notation as in ``reference.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import regression
from ..comm import Comm
from ..exchange import Work
from ..guard import Go, broadcast
from ..linalg import addmm, mm
from ..regression import Block, Regression
from ..workspace import Workspace
from .adamw import bias
from .needs import ADAM


@dataclass(frozen=True)
class Adam:
    """Settings of one parameter group at one step; see :class:`lorapre_dist.config.LoRAPreConfig`."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    residual: float
    max_update: float
    regression: Regression
    boundary_sums = ADAM.boundary_sums
    per_element = 0

    def sum_boundary(self, work: Work, workspace: Workspace) -> None:
        """``sum g^2`` and ``sum w`` of cut rows, of scaled numbers."""
        beta2 = self.betas[1]
        for block in regression.blocks(work, workspace, cut_only=True):
            squares = work.size.scaled(regression.gradient(work, block)).square()
            u = mm(work.size.scaled(work.v.factors.B[:, block.rows]), work.v.A[..., block.held])
            work.edge[:, block.lines, 0] += squares.sum(-1)
            work.edge[:, block.lines, 1] += (beta2 * u.square() + (1 - beta2) * squares).sum(-1)

    def begin(self, work: Work, workspace: Workspace) -> None:
        """``1 - beta^t`` of both moments."""
        work.context = biases(work, self.betas)

    def update_block(self, work: Work, block: Block, workspace: Workspace) -> None:
        """One block: the update of theta, then both moments' rows."""
        _update_block(self, work, block, workspace)

    def finish(self, works: list[Work], comm: Comm, workspace: Workspace) -> None:
        """Nothing is left to do."""


def biases(work: Work, betas: tuple[float, float]) -> list[Any]:
    """``1 - beta^t`` of each beta: a number where the host knows it, else of each matrix."""
    return [bias(beta, work.matrix.taken, work.item.go, work.matrix.dtype) for beta in betas]


def _update_block(rule: Adam, work: Work, block: Block, workspace: Workspace) -> None:
    matrix, size, go = work.matrix, work.size, work.item.go
    A, vA = work.m.A[..., block.held], work.v.A[..., block.held]
    B, vB = work.m.factors.B[:, block.rows], work.v.factors.B[:, block.rows]
    (beta1, beta2), dtype = rule.betas, A.dtype
    bias1, bias2 = (broadcast(bias, 2) for bias in work.context)
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
    fresh = (1 - beta1) / bias1 + rule.residual
    eps = max(rule.eps, torch.finfo(dtype).tiny)
    if "rms_row" in matrix.vectors:
        # m_hat / (sqrt(f w) + eps) = m_hat / sqrt(f) / (sqrt(w) + eps / sqrt(f)): rows of the factor are scaled,
        # not those of the product.
        edge = None if block.lines is None else work.edge[:, block.lines]
        row = matrix.vectors["rms_row"][:, block.rows]
        shrink, floor = _calibrate(rule, work, w, scaled, edge, row)
        torch.mul(B, shrink * keep, out=left).addcmul_(Y, shrink, value=-rule.residual)
        addmm(torch.mul(g, shrink * fresh, out=m), left, A, beta=1)
        _root_plus(w, floor)
    else:
        torch.mul(B, keep, out=left).sub_(Y, alpha=rule.residual)
        addmm(torch.mul(g, fresh, out=m), left, A, beta=1)
        _root_plus(w.div_(bias2), torch.full((), eps, dtype=dtype, device=w.device))
    apply(work, block, m, w, rule)

    regression.refresh_rows(work, 0, block, g, Y, rule.regression, workspace)
    regression.refresh_rows(work, 1, block, a, Yv, rule.regression, workspace)


def _calibrate(rule: Adam, work: Work, w: Tensor, g: Tensor, edge: Tensor | None, row: Tensor) -> tuple[Tensor, Tensor]:
    """Update the rows' root mean squares ``s``; ``1 / sqrt(f)`` and ``eps / sqrt(f)`` (k x n x 1) of the denominator.

    That is ``sqrt(v_hat) + eps``, and ``v_hat = f w`` with ``f = s^2 / bias2 / mean(w)``: so ``sqrt(f w) + eps``, and
    in a row where all of ``w`` is 0 ``s / sqrt(bias2) + eps``. ``w``, ``g`` (k x n x c) and ``edge`` are of scaled
    numbers, ``s`` and what is returned are not.
    """
    q, bias2 = work.matrix.interval.shape[1], broadcast(work.context[1], 1)
    norm_g = edge[..., 0].sqrt() if edge is not None else torch.linalg.vector_norm(g, dim=-1)
    sum_w = edge[..., 1] if edge is not None else w.sum(-1)
    decay_rms(row, work.size.undone(norm_g), rule.betas[1], q, work.item.go)
    # Where all of w is 0, any positive number may stand for 1 / sqrt(f), as it scales numerator and denominator. With
    # this one s / sqrt(bias2) / sqrt(f) is sqrt(tiny / q), which is nothing in all other rows.
    tiny = torch.finfo(row.dtype).tiny
    shrink = ((sum_w + tiny) / q).sqrt_() / (row * bias2**-0.5).clamp_min_(tiny)
    floor = (shrink * rule.eps).add_(math.sqrt(tiny / q))
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


def apply(work: Work, block: Block, m: Tensor, denom: Tensor, rule: Any) -> None:
    """``theta -= lr (scale m / denom + weight_decay theta)``, the quotient clipped; ``m`` is overwritten."""
    rounding, go = work.matrix.rounding, work.item.go
    wide = rounding.wide(block.theta, block.at, m.dtype)
    if rule.weight_decay:
        wide.mul_(go.keep(1 - rule.lr * rule.weight_decay, m.dtype))
    if math.isfinite(rule.max_update):
        m.div_(denom).clamp_(-rule.max_update, rule.max_update)
        wide.add_(m, alpha=-rule.lr * rule.scale)
    else:
        wide.addcdiv_(m, denom, value=-rule.lr * rule.scale)
    rounding.put(wide, block.theta, block.at)
