"""The small solves: damped r x r Gram matrices, factored by Cholesky and never inverted."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_cholesky(grams: list[Tensor], damping: float, relative: bool) -> list[Tensor]:
    """Lower Cholesky factors of ``G + damping I`` (``relative``: damping times the mean eigenvalue of G).

    Args:
        grams: equally sized r x r matrices, positive semi-definite up to rounding.

    A zero Gram with relative damping becomes the identity: what it is solved against is zero as well.
    """
    if not grams:
        return []
    stacked = torch.stack(grams)
    r = stacked.shape[-1]
    # fp64 (r^3 / 3 flops): in fp32 rounding can exceed the damping when r is large and one direction dominates.
    wide = stacked.double()
    if relative:
        delta = damping * wide.diagonal(dim1=-2, dim2=-1).mean(-1)
        delta = torch.where(delta > 0, delta, torch.ones_like(delta))
    else:
        delta = torch.full((len(grams),), damping, dtype=wide.dtype, device=wide.device)
    eye = torch.eye(r, dtype=wide.dtype, device=wide.device)
    lower, info = torch.linalg.cholesky_ex(wide + delta[:, None, None] * eye)
    for _ in range(4):
        # Rounding in the Gram itself can still leave it indefinite; every rank sees the same bits and agrees.
        failed = (info > 0) & torch.isfinite(delta)
        if not bool(failed.any()):
            break
        delta = torch.where(failed, 100 * delta, delta)
        lower, info = torch.linalg.cholesky_ex(wide + delta[:, None, None] * eye)
    return list(lower.to(stacked.dtype).unbind())


def solve_rows(rows: Tensor, lower: Tensor) -> Tensor:
    """``rows (L L^T)^-1``: rows n x r, lower r x r."""
    return torch.cholesky_solve(rows.T, lower).T
