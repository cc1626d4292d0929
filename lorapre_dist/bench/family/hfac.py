"""H-Fac (Nguyen, Chen, Liu, Liu, arXiv 2406.09958), its algorithm for matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import State


@dataclass(frozen=True)
class HFac:
    """Momentum and second moment as means over rows and columns, of a factored Hamiltonian's descent.

    ::

        u = b1 u + (1 - b1) G 1 / q          v = b1 v + (1 - b1) G^T 1 / p
        r = b2 r + (1 - b2) (G^2 + eps) 1    s = b2 s + (1 - b2) (G^2 + eps)^T 1
        V = r s^T / sum(r)
        phi = b1 (u 1^T - G 1 1^T / q) / sqrt(r 1^T / q),   psi = b1 (1 v^T - 1 1^T G / p) / sqrt(1 s^T / p)
        theta <- theta - lr ((phi + psi) / 2 + clip(G / sqrt(V)))

    with ``b = beta (1 - beta^(t-1)) / (1 - beta^t)`` for both, and ``clip(X) = X / max(1, rms(X) / d)``. Assumed:
    ``eps`` 1e-30 and ``d`` 1, which are Adafactor's.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-30
    d: float = 1.0

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """Zero statistics."""
        p, q = theta.shape
        return {name: theta.new_zeros(size) for name, size in {"u": p, "v": q, "r": p, "s": q}.items()}

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """See the class."""
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in self.betas)
        p, q = theta.shape
        square = g.square() + self.eps
        state["u"].lerp_(g.mean(1), 1 - b1)
        state["v"].lerp_(g.mean(0), 1 - b1)
        state["r"].lerp_(square.sum(1), 1 - b2)
        state["s"].lerp_(square.sum(0), 1 - b2)
        V = torch.outer(state["r"], state["s"]) / state["r"].sum()
        phi = b1 * (state["u"] - g.mean(1)) / (state["r"] / q).sqrt()
        psi = b1 * (state["v"] - g.mean(0)) / (state["s"] / p).sqrt()
        update = g / V.sqrt()
        update /= (update.square().mean().sqrt() / self.d).clamp_min(1)
        theta.sub_((phi[:, None] + psi) / 2 + update, alpha=lr)
