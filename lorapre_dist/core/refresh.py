"""The small solves: damped r x r Gram matrices, factored by Cholesky."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .sizes import CHUNK


def damped_inverses(grams: Tensor, damping: float, relative: bool) -> Tensor:
    """``(G + d I)^-1`` of n Grams (n x r x r), in G's dtype; for ``d`` see :func:`damped_cholesky`.

    A zero Gram with relative damping becomes the identity: what it multiplies is zero as well. The result multiplies as
    many rows as the matrix has: one GEMM, in a sixth of the time of triangular solves.
    """
    return _in_chunks(grams, lambda some: _inverse(damped_cholesky(some, damping, relative)))


def _inverse(lower: Tensor) -> Tensor:
    """``(L L^T)^-1``. On a GPU PyTorch leaves that to a library whose batches cannot be part of a CUDA graph."""
    if lower.device.type == "cpu":
        return torch.cholesky_inverse(lower)
    inverse = _triangular_inverse(lower)
    return inverse.mT @ inverse


def _triangular_inverse(lower: Tensor) -> Tensor:
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)


def gauges(grams: Tensor, damping: float) -> Tensor:
    """``(L, L^-1)`` of each ``G = A A^T``, with ``L L^T = G + d I``, ``d`` relative: ``L^-1 A`` has orthonormal rows.

    Up to damping, that is: in a direction of eigenvalue e they have the length ``sqrt(e / (e + d))``. Both are lower
    triangular, and come as one matrix: L, and right of its diagonal the transpose of its inverse; see :func:`unpacked`.
    """

    def packed(some: Tensor) -> Tensor:
        lower = damped_cholesky(some, damping, relative=True)
        return _triangular_inverse(lower).mT.triu(1).add_(lower)

    return _in_chunks(grams, packed)


def unpacked(gauge: Tensor) -> Tensor:
    """``(L, L^-1)`` of what :func:`gauges` found (n x r x r): n x 2 x r x r."""
    both = torch.stack([gauge, gauge.mT], dim=1).tril_()
    both[:, 1].diagonal(dim1=-2, dim2=-1).reciprocal_()
    return both


def damped_cholesky(grams: Tensor, damping: float, relative: bool) -> Tensor:
    """Lower factors of ``G + d I`` of k Grams (k x r x r).

    ``d`` is ``damping`` (``relative``: times the mean eigenvalue of G), but no less than the rounding of G, which is
    that of its trace: less would be no damping at all. So the condition is at most ``r / damping``. Cholesky runs in
    G's dtype where that leaves it a digit at least, as at r = 128 in fp32 with the default damping, else in fp64.

    Where rounding has left a Gram without factor it is that of ``(tr G + d) I``, more than any such Gram: a solve with
    it is short, not wrong.
    """
    rounding = torch.finfo(grams.dtype).eps
    wide = grams.clone()
    if not (relative and wide.shape[-1] * rounding < 0.2 * damping):
        wide = wide.double()
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    delta = trace * (damping / wide.shape[-1]) if relative else torch.full_like(trace, damping)
    delta = torch.maximum(delta, trace * rounding)
    delta.masked_fill_(delta == 0, 1)
    diagonal.add_(delta)
    lower, info = torch.linalg.cholesky_ex(wide)
    if info.device.type == "cpu" and not info.any():
        return lower
    instead = torch.diag_embed((trace + delta).sqrt().expand_as(diagonal)) + 0 * wide  # NaN stays NaN
    return torch.where((info == 0)[:, None, None], lower, instead)


def _in_chunks(grams: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """``solve`` of a few Grams at a time on a CPU, where the cache counts; of all at once where launches do."""
    size = max(1, CHUNK // grams.shape[-1] ** 2) if grams.device.type == "cpu" else max(1, len(grams))
    solved = [solve(chunk).to(grams.dtype) for chunk in grams.split(size)]
    return torch.cat(solved) if len(solved) > 1 else solved[0]
