"""Newton-Schulz orthogonalisation as a polynomial in the Gram: ``X -> X (a + b G + c G^2)``, ``G = X^T X``, repeated.

All iterates are X times a polynomial in the first Gram, so they can be taken on the Gram alone: ``Q`` is the product of
the polynomials, and ``X Q`` the result. ``X`` may then lie in row shards (their Grams add up) or, with ``G = X X^T``
and ``Q X``, in column shards: the same odd polynomial of the singular values.

A Gram carried along by ``G -> P G P`` gains a factor ``a^2 = 12`` in the rounding error of its small eigenvalues at
every iteration, so it is taken afresh from ``X`` after at most ``SEGMENT`` of them. Against the direct form in fp64,
five iterations in fp32, over Gaussian, graded (1 to 1e-6), spiked and rank-deficient spectra: 1e-4 in one go, 3e-5 with
the restart, 2e-5 for the direct form itself; in fp16 with the restart 3e-2, where the direct form in bf16 has 3e-1
(``tests/unit/test_newton_schulz.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Iterations on one Gram.
SEGMENT = 3
#: Symmetric products are taken in so many stripes, from the diagonal on, of so many rows at least.
STRIPES, ROWS = 4, 64


@dataclass(frozen=True)
class NewtonSchulz:
    """The iteration: as in ``torch.optim.Muon``.

    Attributes:
        eps: least Frobenius norm by which a matrix is divided.
    """

    coefficients: tuple[float, float, float]
    steps: int
    eps: float

    def segments(self) -> list[int]:
        """Iterations on each Gram: runs of ``SEGMENT``, the last one shorter."""
        return [min(SEGMENT, self.steps - at) for at in range(0, self.steps, SEGMENT)]


def iteration_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """fp16 on GPUs (ten bits of mantissa, against seven of bf16), ``dtype`` elsewhere and in fp64."""
    return torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype


def gram(X: Tensor, wide: bool) -> Tensor:
    """``X^T X``, or with ``wide`` ``X X^T``, of a matrix or of each in a stack."""
    return symmetric_product(X, X.mT) if wide else symmetric_product(X.mT, X)


def polynomial(G: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """``Q`` (n x n) such that ``X Q`` is X after ``steps`` iterations, from its Gram ``G``."""
    a, b, c = coefficients
    Q: Tensor | None = None
    for step in range(steps):
        P = symmetric_product(G, G).mul_(c).add_(G, alpha=b)
        P.diagonal().add_(a)
        # Polynomials in one Gram: they commute, and their products are symmetric.
        Q = P if Q is None else symmetric_product(Q, P)
        if step + 1 < steps:
            G = symmetric_product(P @ G, P)
    assert Q is not None
    return Q


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """``left right`` (n x k times k x n), known to be symmetric: what lies right of the diagonal's blocks, mirrored."""
    n = left.shape[0]
    if left.ndim > 2 or n < ROWS * (2 if left.device.type == "cpu" else STRIPES):
        return left @ right
    out = left.new_empty(n, n)
    for low, high in stripes(n, ROWS):
        torch.mm(left[low:high], right[:, low:], out=out[low:high, low:])
    return mirror(out, ROWS)


def stripes(n: int, rows: int = 1) -> list[tuple[int, int]]:
    """Rows of each stripe of an n x n matrix, at least ``rows`` in all but the last."""
    size = max(rows, -(-n // STRIPES))
    return [(low, min(n, low + size)) for low in range(0, n, size)]


def mirror(out: Tensor, rows: int = 1) -> Tensor:
    """Fill what lies left of the diagonal's blocks, in place."""
    for low, high in stripes(out.shape[0], rows)[:-1]:
        out[high:, low:high] = out[low:high, high:].T
    return out


def packed(symmetric: Tensor) -> Tensor:
    """What lies right of the diagonal's blocks, 1-D: all that has to be sent of a symmetric matrix."""
    return torch.cat([symmetric[low:high, low:].reshape(-1) for low, high in stripes(symmetric.shape[0])])


def packed_numel(n: int) -> int:
    """Elements of :func:`packed` for an n x n matrix."""
    return sum((high - low) * (n - low) for low, high in stripes(n))


def unpacked(flat: Tensor, n: int) -> Tensor:
    """The n x n matrix of :func:`packed`."""
    out, at = flat.new_empty(n, n), 0
    for low, high in stripes(n):
        size = (high - low) * (n - low)
        out[low:high, low:] = flat[at : at + size].view(high - low, -1)
        at += size
    return mirror(out)
