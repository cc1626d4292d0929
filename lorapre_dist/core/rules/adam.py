"""LoRA-Pre's Adam: both moments factored. Its rule in a step (``step.py``); notation as in ``reference.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels, regression
from ..comm import Comm
from ..exchange import Work
from ..guard import Go, broadcast
from ..linalg import gram, mm
from ..regression import Block, Regression
from ..workspace import Workspace
from .adamw import bias
from .needs import ADAM


@dataclass(frozen=True)
class Adam:
    """Settings of one parameter group at one step; see :class:`lorapre_dist.config.LoRAPreConfig`.

    ``lr`` may be a tensor (0-d) on the device.
    """

    lr: Any
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    residual: float
    max_update: float
    regression: Regression
    kernels: str = "eager"
    boundary_sums = ADAM.boundary_sums
    boundary_largest = False
    per_element = 0

    @property
    def decay(self) -> Any:
        """What weights lose in a step."""
        return self.lr * self.weight_decay

    def sum_boundary(self, work: Work, workspace: Workspace) -> None:
        """``sum g^2`` and ``sum w`` of cut rows, of scaled numbers."""
        beta2 = self.betas[1]
        for block in regression.blocks(work, workspace, cut_only=True):
            squares = work.size.scaled(regression.gradient(work, block)).square()
            u = mm(work.size.scaled(work.v.factors.B[:, block.rows]), work.v.A[..., block.held])
            work.edge[:, block.lines, 0] += squares.sum(-1)
            work.edge[:, block.lines, 1] += (beta2 * u.square() + (1 - beta2) * squares).sum(-1)

    def begin(self, work: Work, workspace: Workspace) -> None:
        """``1 - beta^t`` of both moments, and the Gram of vA where a row's sum of ``w`` is known of it."""
        work.context = Context(*([] if self._in_kernels(work) else biases(work, self.betas)))
        if "rms_row" in work.matrix.vectors and not (work.matrix.peers and work.matrix.lends):
            work.context.gram = gram(work.v.A, wide=True)

    def update_block(self, work: Work, block: Block, workspace: Workspace) -> None:
        """One block: the update of theta, then both moments' rows."""
        (_update_in_kernels if self._in_kernels(work) else _update_block)(self, work, block, workspace)

    def _in_kernels(self, work: Work) -> bool:
        """Whether a block's rows are stepped in kernels, and theta too; ``paper`` does without the former."""
        return "rms_row" in work.matrix.vectors and kernels.chosen(self.kernels, work.m.A) == "triton"

    def finish(self, works: list[Work], comm: Comm, workspace: Workspace) -> None:
        """Nothing is left to do."""

    def pace(self, go: Go, dtype: torch.dtype) -> dict[str, Any]:
        """What :class:`kernels.Update` needs of the settings in every block."""
        decay = go.keep(1 - self.decay, dtype) if self.weight_decay else 1
        return {"bound": self.max_update, "decay": decay, "rate": self.lr * self.scale, "go": go}


@dataclass
class Context:
    """What is kept from block to block.

    Attributes:
        bias1, bias2: ``1 - beta^t`` of the moments: numbers, or of each matrix (k); None where kernels work them out.
        gram: ``vA vA^T`` (k x s x s), of whole rows.
    """

    bias1: Any = None
    bias2: Any = None
    gram: Tensor | None = None


def biases(work: Work, betas: tuple[float, float]) -> list[Any]:
    """``1 - beta^t`` of each beta: a number where the host knows it, else of each matrix."""
    return [bias(beta, work.matrix.taken, work.item.go, work.matrix.dtype) for beta in betas]


def _update_block(rule: Adam, work: Work, block: Block, workspace: Workspace) -> None:
    size, go = work.size, work.item.go
    A, vA = work.m.A[..., block.held], work.v.A[..., block.held]
    B, vB = work.m.factors.B[:, block.rows], work.v.factors.B[:, block.rows]
    (beta1, beta2), dtype = rule.betas, A.dtype
    bias1 = broadcast(work.context.bias1, 2)
    g = regression.gradient(work, block)
    a = torch.abs(g, out=workspace.take("a", g.shape, g))

    # Y and Yv: regression of g and |g| on the old A.
    Y = regression.regress(g, work.m, block, "Y", workspace)
    Yv = regression.regress(a, work.v, block, "Yv", workspace)

    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product; nothing where no step is taken.
    # m_hat / (sqrt(f w) + eps) = m_hat / sqrt(f) / (sqrt(w) + eps / sqrt(f)): rows of the factor are scaled, not those
    # of the product. w = beta2 (vB vA)^2 + (1 - beta2) g^2 is of scaled numbers.
    low = torch.mul(size.scaled(vB), math.sqrt(beta2), out=workspace.take("low", vB.shape, A))
    shrink = _calibrate(rule, work, block, g, low)
    left = torch.mul(B, shrink * (go.of(beta1, dtype) / bias1), out=workspace.take("left", B.shape, A))
    left.addcmul_(Y, shrink, value=-rule.residual)
    wide = work.matrix.rounding.wide(block.theta, block.at, dtype)
    update = kernels.Update(
        wide, block.grad, g, left, A, low, vA,
        gain=shrink * ((1 - beta1) / bias1 + rule.residual),
        floor=shrink * rule.eps,
        size=size,
        second=1 - beta2,
        **rule.pace(go, dtype),
    )  # fmt: skip
    kernels.apply(update, kernels.chosen(rule.kernels, A), workspace)
    work.matrix.rounding.put(wide, block.theta, block.at)

    regression.refresh_rows(work, 0, block, g, Y, rule.regression, workspace)
    regression.refresh_rows(work, 1, block, a, Yv, rule.regression, workspace)


def _update_in_kernels(rule: Adam, work: Work, block: Block, workspace: Workspace) -> None:
    """The same in four products and three kernels: what :func:`_update_block` says operation by operation."""
    from ..kernels import rows

    matrix, size, (m, v) = work.matrix, work.size, work.moments
    A, vA = m.A[..., block.held], v.A[..., block.held]
    g, a, norm = rows.read(block.grad, size, A, workspace)
    stepped = rows.step(
        rows.Rows(
            m.factors.B[:, block.rows],
            v.factors.B[:, block.rows],
            Y=regression.regress(g, m, block, "Y", workspace),
            Yv=regression.regress(a, v, block, "Yv", workspace),
            rms=matrix.vectors["rms_row"][:, block.rows],
            gram=work.context.gram,
            norm=norm,
            sums=None if block.lines is None else work.edge[:, block.lines],
            taken=matrix.taken,
            size=size,
            go=work.item.go,
            columns=matrix.interval.shape[1],
        ),
        rule.betas,
        rule.regression.gammas,
        rule.residual,
        rule.eps,
        workspace,
    )
    wide = matrix.rounding.wide(block.theta, block.at, matrix.dtype)
    update = kernels.Update(
        wide, block.grad, g, stepped.left, A, stepped.low, vA,
        gain=stepped.gain,
        floor=stepped.floor,
        size=size,
        second=1 - rule.betas[1],
        **rule.pace(work.item.go, matrix.dtype),
    )  # fmt: skip
    kernels.apply(update, "triton", workspace)
    matrix.rounding.put(wide, block.theta, block.at)
    regression.add_to_Z(work, m, block, stepped.scaled, g)
    regression.add_to_Z(work, v, block, stepped.scaled_v, a)


def _calibrate(rule: Adam, work: Work, block: Block, g: Tensor, low: Tensor) -> Tensor:
    """``1 / sqrt(f)`` of each row, by which ``v_hat = f w`` (k x n x 1, or 1 x 1 x 1), in its gradient's own size.

    In ``stable`` ``f = s^2 / bias2 / mean(w)``, of the rows' root mean squares ``s``, which are updated; in ``paper``
    it is ``1 / bias2``. A row's sum of ``(low vA)^2`` is ``low (vA vA^T) low^T``: ``w`` need not be formed for it.
    """
    (_, beta2), q, bias2 = rule.betas, work.matrix.interval.shape[1], work.context.bias2
    if "rms_row" not in work.matrix.vectors:
        return torch.as_tensor(broadcast(bias2, 2), dtype=low.dtype, device=low.device).sqrt().view(-1, 1, 1)
    if block.lines is not None:
        squares, sum_w = work.edge[:, block.lines, :2].unbind(-1)
        norm = squares.sqrt()
    else:
        norm = torch.linalg.vector_norm(work.size.scaled(g), dim=-1)
        known = mm(low, work.context.gram).mul_(low).sum(-1)
        sum_w = known.addcmul_(norm, norm, value=1 - beta2)
    row = work.matrix.vectors["rms_row"][:, block.rows]
    decay_rms(row, work.size.undone(norm), beta2, q, work.item.go)
    # Each element of w is taken for a tiny number more: in a row that is all 0 v_hat is s^2 / bias2.
    tiny = torch.finfo(row.dtype).tiny
    shrink = (sum_w / q).add_(tiny).sqrt_().div_((row * broadcast(bias2, 1) ** -0.5).clamp_min_(tiny))
    return shrink[..., None]


def decay_rms(rms: Tensor, norm: Tensor, beta: float, count: int, go: Go) -> None:
    """``rms^2 <- beta rms^2 + (1 - beta) norm^2 / count``, in place, without forming a square that is no number."""
    kept, fresh = go.keep(math.sqrt(beta), rms.dtype), go.of(math.sqrt((1 - beta) / count), rms.dtype)
    torch.hypot(rms * kept, norm * fresh, out=rms)
