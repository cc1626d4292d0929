"""Dion (Ahn, Xu, Abreu, Fan, Magakyan, Sharma, Zhan, Langford, arXiv 2504.05295), Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import State


@dataclass(frozen=True)
class Dion:
    """One power iteration a step finds a rank-r part of the momentum, which takes an orthonormal step and then fades.

    ``M`` (p x q) is a full buffer, with what no step has taken yet; ``Q`` (q x r) is where the iteration goes on::

        B = M + G
        P = orth(B Q)                                       p x r, by QR
        R = B^T P                                           q x r
        M = B - (1 - mu) P R^T                              error feedback
        Q = R, each column divided by its norm
        theta <- theta - lr sqrt(p / q) P Q^T

    Assumed: the first ``Q`` has orthonormal columns at random; a column of ``R`` that is zero stays zero.
    """

    rank: int
    mu: float = 0.95

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """Zero ``M``, and ``Q``."""
        drawn = torch.randn(theta.shape[1], self.rank, dtype=theta.dtype).to(theta.device)
        return {"M": torch.zeros_like(theta), "Q": torch.linalg.qr(drawn).Q}

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """See the class."""
        B = state["M"] + g
        P = torch.linalg.qr(B @ state["Q"]).Q
        R = B.T @ P
        state["M"] = B - (1 - self.mu) * P @ R.T
        state["Q"] = R / R.norm(dim=0).clamp_min(1e-8)
        p, q = theta.shape
        theta.sub_(P @ state["Q"].T, alpha=lr * (p / q) ** 0.5)
