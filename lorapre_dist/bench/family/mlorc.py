"""MLorc (Shen, Zhang, Huang, Xu, Zhang, Shen, arXiv 2506.01897), Algorithm 1: MLorc-AdamW."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import State


@dataclass(frozen=True)
class MLorc:
    """Both moments are kept as randomised SVDs of rank r, made whole, stepped as Adam's, and compressed again.

    ::

        m = beta1 (mU mS mV) + (1 - beta1) G
        v~ = vU vS vV;   v~ <- max(v~, 0), and where it was negative: the mean size of what was negative
        v = beta2 v~ + (1 - beta2) G^2
        keep RSVD(m), RSVD(v)
        theta <- theta - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    ``RSVD(X)``: ``Q = orth(X Omega)`` with a Gaussian ``Omega`` of ``r + oversampling`` columns, then the r largest of
    the SVD of ``Q^T X``. Assumed: oversampling 0, as in the paper's experiments; no weight decay.
    """

    rank: int
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    oversampling: int = 0

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """Zero moments."""
        (p, q), r = theta.shape, self.rank
        shapes = {"U": (p, r), "S": (r,), "V": (r, q)}
        return {f"{moment}_{x}": theta.new_zeros(shape) for moment in "mv" for x, shape in shapes.items()}

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """See the class."""
        beta1, beta2 = self.betas
        m = beta1 * _whole(state, "m") + (1 - beta1) * g
        v = beta2 * rectified(_whole(state, "v")) + (1 - beta2) * g.square()
        self._keep(state, "m", m)
        self._keep(state, "v", v)
        theta.sub_((m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + self.eps), alpha=lr)

    def _keep(self, state: State, moment: str, whole: Tensor) -> None:
        omega = torch.randn(whole.shape[1], self.rank + self.oversampling, dtype=whole.dtype).to(whole.device)
        Q = torch.linalg.qr(whole @ omega).Q
        U, S, Vh = torch.linalg.svd(Q.T @ whole, full_matrices=False)
        r = self.rank
        kept = {"U": Q @ U[:, :r], "S": S[:r].clone(), "V": Vh[:r].clone()}
        state.update({f"{moment}_{x}": part for x, part in kept.items()})


def _whole(state: State, moment: str) -> Tensor:
    return (state[f"{moment}_U"] * state[f"{moment}_S"]) @ state[f"{moment}_V"]


def rectified(v: Tensor) -> Tensor:
    """``v`` without its negative elements: in their place is the mean of their sizes."""
    negative = v < 0
    size = torch.where(negative, -v, 0).sum() / negative.sum().clamp_min(1)
    return torch.where(negative, size, v)
