"""Adam with a factored first moment and Adafactor's second: the statistics of rows and of columns (arXiv 1804.04235).

Its rule in a step (``step.py``); notation as in ``reference.py``. ``v_ij = R_i C_j / mean(C)``, with ``R`` and ``C``
the decayed means of ``g^2`` over rows and columns, of which the roots are kept. A first pass over the gradient sums up
the columns, and the rows that are cut between ranks. ``R`` lies with the rows, ``C`` (q numbers) on every rank that
shares the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import kernels, regression
from ..exchange import Work
from ..guard import broadcast
from ..regression import Block
from ..workspace import Workspace
from .adam import Adam, Context, biases, decay_rms
from .needs import ADAFACTOR


@dataclass(frozen=True)
class Adafactor(Adam):
    """Settings of one parameter group at one step, as Adam's; of its rates ``gammas`` there is one."""

    boundary_sums = ADAFACTOR.boundary_sums

    def sum_boundary(self, work: Work, workspace: Workspace) -> None:
        """This rank's part of the columns' sums of ``g^2`` (scaled), and for cut rows of the row's."""
        work.column_sums = torch.zeros_like(work.matrix.vectors["rms_col"])
        for block in regression.blocks(work, workspace):
            g = regression.gradient(work, block)
            scaled = work.size.scaled(g)
            squares = torch.mul(scaled, scaled, out=workspace.take("w", g.shape, g))
            work.column_sums[:, block.columns] += squares.sum(-2)
            if block.lines is not None:
                work.edge[:, block.lines, 0] += squares.sum(-1)

    def begin(self, work: Work, workspace: Workspace) -> None:
        """``1 - beta^t`` of both moments, and the columns' statistics."""
        work.context = Context(*biases(work, self.betas))
        assert work.column_sums is not None
        norms = work.size.undone(work.column_sums.sqrt())
        decay_rms(work.matrix.vectors["rms_col"], norms, self.betas[1], work.matrix.interval.shape[0], work.item.go)

    def update_block(self, work: Work, block: Block, workspace: Workspace) -> None:
        """One block: its rows' statistics, the update of theta, then the factors' rows."""
        matrix, size, go = work.matrix, work.size, work.item.go
        A, B = work.m.A[..., block.held], work.m.factors.B[:, block.rows]
        (beta1, beta2), dtype = self.betas, A.dtype
        bias1 = broadcast(work.context.bias1, 2)
        g = regression.gradient(work, block)
        Y = regression.regress(g, work.m, block, "Y", workspace)

        if block.lines is None:
            energy = torch.linalg.vector_norm(size.scaled(g), dim=-1)
        else:
            energy = work.edge[:, block.lines, 0].sqrt()
        rows, columns = matrix.vectors["rms_row"][:, block.rows], matrix.vectors["rms_col"]
        decay_rms(rows, size.undone(energy), beta2, matrix.interval.shape[1], go)
        # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product; nothing without a step
        keep = go.of(beta1, dtype) / bias1
        left = torch.mul(B, keep, out=workspace.take("left", B.shape, A)).sub_(Y, alpha=self.residual)
        tiny = torch.finfo(dtype).tiny
        most = columns.amax(-1, keepdim=True).clamp_min(tiny)
        level = (most * (columns / most).square_().mean(-1, keepdim=True).sqrt_()).clamp_min_(tiny)
        down = rows * broadcast(work.context.bias2, 1) ** -0.5 / level
        gain = torch.as_tensor((1 - beta1) / bias1 + self.residual, dtype=dtype, device=A.device)
        wide = work.matrix.rounding.wide(block.theta, block.at, dtype)
        update = kernels.Update(
            wide, block.grad, g, left, A, down[..., None], columns[..., None, block.columns],
            gain=gain.view(-1, 1, 1),
            floor=A.new_full((1, 1, 1), max(self.eps, tiny)),
            size=size,
            second=0.0,
            **self.pace(go, dtype),
        )  # fmt: skip
        kernels.apply(update, kernels.chosen(self.kernels, A), workspace)
        work.matrix.rounding.put(wide, block.theta, block.at)
        regression.refresh_rows(work, 0, block, g, Y, self.regression, workspace)
