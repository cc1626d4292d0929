"""The small solves: damped r x r Gram matrices, factored by Cholesky in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements of the Grams that are solved at a time on a CPU.
CHUNK = 1 << 16


def damped_inverses(grams: list[Tensor], damping: float, relative: bool) -> list[Tensor]:
    """``(G + damping I)^-1`` of each Gram (``relative``: damping times the mean eigenvalue of G), in G's dtype.

    Args:
        grams: equally sized r x r matrices, positive semi-definite up to rounding.

    A zero Gram with relative damping becomes the identity: what it multiplies is zero as well.

    The inverse comes from a Cholesky factor in fp64, where even r = 1024 and one dominant direction (condition 1e7)
    leave nine digits, and is rounded once. What it multiplies has as many rows as the matrix; as one GEMM that takes
    a sixth of the time of triangular solves.
    """
    # A few at a time where the cache counts, all at once where launches count.
    size = max(1, CHUNK // grams[0].numel()) if grams and grams[0].device.type == "cpu" else len(grams)
    chunks = [grams[k : k + size] for k in range(0, len(grams), size)] if grams else []
    return [inverse for chunk in chunks for inverse in _damped_inverses(chunk, damping, relative)]


def _damped_inverses(grams: list[Tensor], damping: float, relative: bool) -> list[Tensor]:
    wide = torch.stack(grams).double()
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    if relative:
        delta = damping * diagonal.mean(-1)
        delta = torch.where(delta > 0, delta, torch.ones_like(delta))
    else:
        delta = torch.full((len(grams),), damping, dtype=wide.dtype, device=wide.device)
    rounding = torch.finfo(grams[0].dtype).eps * diagonal.mean(-1)  # an absolute damping may be far below it
    diagonal.add_(delta[:, None])
    lower, info = torch.linalg.cholesky_ex(wide)
    for _ in range(4):
        # Rounding in the Gram itself can still leave it indefinite; every rank sees the same bits and agrees.
        failed = (info > 0) & torch.isfinite(delta)
        if not bool(failed.any()):
            break
        more = torch.where(failed, torch.maximum(99 * delta, rounding), torch.zeros_like(delta))
        diagonal.add_(more[:, None])
        delta = delta + more
        lower, info = torch.linalg.cholesky_ex(wide)
    return list(torch.cholesky_inverse(lower).to(grams[0].dtype).unbind())
