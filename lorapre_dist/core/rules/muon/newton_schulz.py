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

from ...linalg import mm, symmetric_product
from .cuts import segments


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
        """Iterations on each Gram, see ``cuts.py``."""
        return segments(self.steps)


def iteration_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """fp16 on GPUs (ten bits of mantissa, against seven of bf16), ``dtype`` elsewhere and in fp64."""
    return torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype


def polynomial(G: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """``Q`` such that ``X Q`` is X after ``steps`` iterations, from its Gram ``G`` (k x n x n, both)."""
    a, b, c = coefficients
    Q: Tensor | None = None
    for step in range(steps):
        P = symmetric_product(G, G).mul_(c).add_(G, alpha=b)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        # Polynomials in one Gram: they commute, and their products are symmetric.
        Q = P if Q is None else symmetric_product(Q, P)
        if step + 1 < steps:
            G = symmetric_product(mm(P, G), P)
    assert Q is not None
    return Q
