"""SMMF (Park, Lee, arXiv 2412.08894), Algorithm 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import State


@dataclass(frozen=True)
class SMMF:
    """Adam whose moments are reshaped to be nearly square and kept as products of two non-negative vectors.

    On the gradient as an n x m matrix, ``n m = p q`` and ``n`` as near to ``m`` as divisors allow::

        M = beta1_t (sign * r_M c_M^T) + (1 - beta1_t) G         beta1_t = beta1 growth^(t - 1)
        V = beta2_t (r_V c_V^T) + (1 - beta2_t) G^2              beta2_t = 1 - t^decay
        keep sign = (M > 0) and the factors of |M| and V: row sums and column sums, one of them divided by the total
        theta <- theta - lr M / (sqrt(V) + eps)

    Set as the paper does for transformers: decay -0.8, growth 0.999. Assumed: the sums that are divided are those of
    fewer elements, as it makes no difference to the product. The signs are kept as bools, of one byte.
    """

    beta1: float = 0.9
    growth: float = 0.999
    decay: float = -0.8
    eps: float = 1e-8

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """Zero moments."""
        n, m = square(theta.numel())
        zeros = {f"{x}_{moment}": theta.new_zeros(k) for moment in "MV" for x, k in (("r", n), ("c", m))}
        return zeros | {"sign": torch.zeros(n, m, dtype=torch.bool, device=theta.device)}

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """See the class."""
        G = g.reshape(state["sign"].shape)
        beta1, beta2 = self.beta1 * self.growth ** (t - 1), 1 - t**self.decay
        old = torch.outer(state["r_M"], state["c_M"])
        M = beta1 * torch.where(state["sign"], old, -old) + (1 - beta1) * G
        V = beta2 * torch.outer(state["r_V"], state["c_V"]) + (1 - beta2) * G.square()
        state["sign"] = M > 0
        state["r_M"], state["c_M"] = factors(M.abs())
        state["r_V"], state["c_V"] = factors(V)
        theta.sub_((M / (V.sqrt() + self.eps)).view_as(theta), alpha=lr)


def square(numel: int) -> tuple[int, int]:
    """The two numbers nearest to each other whose product is ``numel``, the larger first."""
    m = next(m for m in range(math.isqrt(numel), 0, -1) if numel % m == 0)
    return numel // m, m


def factors(X: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums and column sums of a non-negative matrix, so that their product has its sums."""
    r, c = X.sum(1), X.sum(0)
    total = X.sum()
    return r, torch.where(total > 0, c / total, c)
