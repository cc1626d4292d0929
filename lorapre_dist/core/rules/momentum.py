"""Optimizers with one factored moment: Muon, SGD with momentum, Lion. They differ in the update.

Their rule in a step (``step.py``); notation as in ``reference.py``. The update's direction is
``u = keep B A + fresh g + residual (g - Y A)``, from the old factors and the fresh gradient; then ``theta -= lr * u``,
or of its sign, or of its orthogonalisation. For the latter ``u`` is kept for all of a bucket's matrices at once, as
large as this rank's pieces of them; for the others a row block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernels, regression
from ..comm import Comm
from ..exchange import Work
from ..linalg import addmm
from ..regression import Block, Regression
from ..workspace import Workspace
from .muon import cuts, orthogonal
from .muon.newton_schulz import NewtonSchulz
from .needs import MOMENTUM


@dataclass(frozen=True)
class Momentum:
    """Settings of one parameter group at one step.

    Attributes:
        lr: of the update, by shape of the matrix.
        decay: ``theta`` is multiplied by 1 minus this.
        keep, fresh, residual: weights in ``u``, see above.
        sign: the update is that of each element of ``u``.
        orthogonal: the update is ``u`` made orthogonal so; None if it is not.
    """

    lr: Callable[[tuple[int, int]], Any]
    decay: Any
    keep: float
    fresh: float
    residual: float
    regression: Regression
    sign: bool = False
    orthogonal: NewtonSchulz | None = None
    boundary_sums = MOMENTUM.boundary_sums
    boundary_largest = False

    @property
    def per_element(self) -> int:
        """What making ``u`` orthogonal takes."""
        return cuts.PER_ELEMENT if self.orthogonal else 0

    def sum_boundary(self, work: Work, workspace: Workspace) -> None:
        """Nothing but ``Y`` is summed."""

    def begin(self, work: Work, workspace: Workspace) -> None:
        """Room for ``u`` where all of it is kept."""
        if self.orthogonal:
            work.context = torch.empty_like(work.item.theta, dtype=work.matrix.dtype)

    def update_block(self, work: Work, block: Block, workspace: Workspace) -> None:
        """One block: its rows of ``u``, the update unless it has to wait for all of ``u``, then the factors' rows."""
        A, B, go, u = work.m.A[..., block.held], work.m.factors.B[:, block.rows], work.item.go, work.context
        g = regression.gradient(work, block)
        Y = regression.regress(g, work.m, block, "Y", workspace)
        # keep B A + fresh g + residual (g - Y A), as one product; nothing where no step is taken
        left = torch.mul(B, go.of(self.keep, B.dtype), out=workspace.take("left", B.shape, A))
        left.sub_(Y, alpha=self.residual)
        numel = g[0].numel()
        out = workspace.take("m", g.shape, A) if u is None else u[:, block.at : block.at + numel].view(g.shape)
        direction = addmm(out, left, A, beta=self.fresh + self.residual, start=g)
        if u is None:
            direction = direction.sign_() if self.sign else direction
            self._apply(work, block, direction)
        regression.refresh_rows(work, 0, block, g, Y, self.regression, workspace)

    def finish(self, works: list[Work], comm: Comm, workspace: Workspace) -> None:
        """The update where it is made orthogonal."""
        if self.orthogonal:
            limit = workspace.block_on(works[0].item.theta.device.type)
            pieces = [(work.matrix, work.context, work.size) for work in works]
            orthogonal.orthogonalise(pieces, self.orthogonal, comm, limit, workspace.bucket)
            for work in works:
                for block in regression.blocks(work, workspace):
                    numel = block.theta[0].numel()
                    self._apply(work, block, work.context[:, block.at : block.at + numel].view(block.theta.shape))

    def _apply(self, work: Work, block: Block, update: Tensor) -> None:
        rounding, shape = work.matrix.rounding, work.matrix.interval.shape
        wide = rounding.wide(block.theta, block.at, update.dtype)
        keep = work.item.go.keep(1 - self.decay, update.dtype)
        kernels.subtract(wide, update, None, math.inf, keep, self.lr(shape))
        rounding.put(wide, block.theta, block.at)
