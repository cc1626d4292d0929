"""Products of stacks of matrices (k x n x m): what PyTorch has no one function for.

A stack of one goes through the functions for matrices, which are faster on a CPU. Symmetric products are taken in
stripes from the diagonal on, so that little is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sizes import ROWS, is_striped, stripes


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a b`` of each pair."""
    if a.shape[0] > 1:
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if out is None:
        return torch.mm(a[0], b[0])[None]
    torch.mm(a[0], b[0], out=out[0])
    return out


def addmm(out: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any = 1.0, start: Tensor | None = None) -> Tensor:
    """``out <- beta start + alpha a b`` (``start``: ``out`` itself)."""
    if isinstance(beta, Tensor):  # as it depends on whether a step is taken
        start, a, beta, alpha = (out if start is None else start).mul_(beta), a * alpha, 1.0, 1.0
    start = out if start is None else start
    if out.shape[0] > 1:
        return torch.baddbmm(start, a, b, beta=beta, alpha=alpha, out=out)
    torch.addmm(start[0], a[0], b[0], beta=beta, alpha=alpha, out=out[0])
    return out


def gram(X: Tensor, wide: bool) -> Tensor:
    """``X^T X``, or with ``wide`` ``X X^T``, of a matrix or of each in a stack."""
    if X.ndim == 3 and X.shape[0] == 1:
        return gram(X[0], wide)[None]
    return symmetric_product(X, X.mT) if wide else symmetric_product(X.mT, X)


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left right`` (n x k times k x n), known to be symmetric: what lies right of the diagonal's blocks, mirrored."""
    if left.ndim == 3 and left.shape[0] == 1:
        return symmetric_product(left[0], right[0])[None]
    n = left.shape[0]
    if left.ndim > 2 or not is_striped(n, left.device.type):
        return left @ right
    out = left.new_empty(n, n)
    for low, high in stripes(n, ROWS):
        torch.mm(left[low:high], right[:, low:], out=out[low:high, low:])
    return mirror(out, ROWS)


def mirror(out: Tensor, rows: int = 1) -> Tensor:
    """Fill what lies left of the diagonal's blocks, in place."""
    for low, high in stripes(out.shape[-1], rows)[:-1]:
        out[..., high:, low:high] = out[..., low:high, high:].mT
    return out


def packed(symmetric: Tensor) -> Tensor:
    """What lies right of the diagonal's blocks (of k x n x n), 1-D: all that has to be sent of symmetric matrices."""
    n = symmetric.shape[-1]
    return torch.cat([symmetric[:, low:high, low:].reshape(-1) for low, high in stripes(n)])


def unpacked(flat: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` (k x n x n) from :func:`packed`."""
    k, n, _ = out.shape
    at = 0
    for low, high in stripes(n):
        size = k * (high - low) * (n - low)
        out[:, low:high, low:] = flat[at : at + size].view(k, high - low, -1)
        at += size
    return mirror(out)
