"""The small solves: damped r x r Gram matrices, factored by Cholesky."""

from __future__ import annotations

import torch
from torch import Tensor

from .sizes import CHUNK


def damped_inverses(grams: list[Tensor], damping: float, relative: bool) -> list[Tensor]:
    """``(G + d I)^-1`` of each Gram, in G's dtype; for ``d`` see :func:`damped_cholesky`.

    A zero Gram with relative damping becomes the identity: what it multiplies is zero as well. The result multiplies as
    many rows as the matrix has: one GEMM, in a sixth of the time of triangular solves.
    """
    found: list[Tensor] = []
    for chunk in _chunks(grams):
        inverse = torch.cholesky_inverse(damped_cholesky(chunk, damping, relative))
        found += inverse.to(grams[0].dtype).unbind()
    return _as_given(found, grams)


def gauges(grams: list[Tensor], damping: float) -> list[tuple[Tensor, Tensor]]:
    """``(L, L^-1)`` of each ``G = A A^T``, with ``L L^T = G + d I``, ``d`` relative: ``L^-1 A`` has orthonormal rows.

    Up to damping, that is: in a direction of eigenvalue e they have the length ``sqrt(e / (e + d))``.
    """
    lowers: list[Tensor] = []
    inverses: list[Tensor] = []
    for chunk in _chunks(grams):
        lower = damped_cholesky(chunk, damping, relative=True)
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        lowers += lower.to(grams[0].dtype).unbind()
        inverses += torch.linalg.solve_triangular(lower, eye, upper=False).to(grams[0].dtype).unbind()
    return list(zip(_as_given(lowers, grams), _as_given(inverses, grams), strict=True))


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


def _chunks(grams: list[Tensor]) -> list[Tensor]:
    """Grams of one size (or stacks of them), stacked: a few at a time where the cache counts, all where launches do."""
    single = [g for gram in grams for g in (gram.unbind() if gram.ndim == 3 else (gram,))]
    if not single:
        return []
    size = max(1, CHUNK // single[0].numel()) if single[0].device.type == "cpu" else len(single)
    return [torch.stack(single[k : k + size]) for k in range(0, len(single), size)]


def _as_given(found: list[Tensor], grams: list[Tensor]) -> list[Tensor]:
    """One result for each of ``grams``, stacked where that was a stack."""
    each = iter(found)
    return [torch.stack([next(each) for _ in gram]) if gram.ndim == 3 else next(each) for gram in grams]
