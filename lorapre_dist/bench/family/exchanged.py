"""LoRA-Pre on whole matrices with a part exchanged: which part the distance to AdamW comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorapre_dist import reference
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.checks import choice

from .dense import State

MOMENTA = ("factors", "subspace", "full")
SECOND_MOMENTS = ("factors", "full")


@dataclass(frozen=True)
class Exchanged:
    """The ``stable`` step of :mod:`lorapre_dist.reference` with other moments.

    ``m`` is ``"factors"`` as there; AdamW's own, ``"full"``, without a residual; or ``"subspace"``: the factors follow
    the whole momentum ``M = beta1 B A + (1 - beta1) g`` rather than the gradient, by one step of subspace iteration ::

        B <- M A^T,    A <- (B^T B + d)^-1 B^T M,    and the gauge

    which decays the product by ``beta1`` and needs no rate for each factor. ``v`` is ``"factors"`` as there, or
    AdamW's own, ``"full"``.

    Raises:
        ConfigError: another ``m`` or ``v``.
    """

    config: LoRAPreConfig
    m: str = "factors"
    v: str = "factors"

    def __post_init__(self) -> None:
        choice("m", self.m, MOMENTA)
        choice("v", self.v, SECOND_MOMENTS)

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """Factors as the reference begins with, and zeros for what is full."""
        (p, q), config = theta.shape, self.config
        generator = torch.Generator().manual_seed(config.seed)
        m_A, v_A = (
            torch.randn(r, q, generator=generator, dtype=theta.dtype) * config.init_std
            for r in (config.rank, config.resolved_rank_v)
        )
        state = reference.init_state((p, q), config, m_A, v_A, theta.dtype)
        full = {key: torch.zeros_like(theta) for key, kind in (("m", self.m), ("v", self.v)) if kind == "full"}
        return state | full

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """See the class."""
        config, (beta1, _), bound = self.config, self.config.betas, self.config.resolved_max_update
        if self.m == "full":
            state["m"].lerp_(g, 1 - beta1)
            m = state["m"] / (1 - beta1**t)
        else:
            B, A = state["m_B"], state["m_A"]
            M = beta1 * B @ A + (1 - beta1) * g
            m = M / (1 - beta1**t) + config.resolved_residual * reference.residual(A, g, config)
            if self.m == "factors":
                refreshed = reference.refresh(B, A, g, config.resolved_gammas[0], config)
            else:
                left = M @ A.T
                refreshed = reference.gauge(left, reference.solve_gram(left.T @ left, left.T @ M, config), config)
            state["m_B"], state["m_A"] = refreshed
        theta.sub_(lr * (m / (self._second(g, state, t).sqrt() + config.eps)).clamp(-bound, bound))

    def _second(self, g: Tensor, state: State, t: int) -> Tensor:
        config, beta2 = self.config, self.config.betas[1]
        if self.v == "full":
            state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            return state["v"] / (1 - beta2**t)
        vB, vA = state["v_B"], state["v_A"]
        w = beta2 * (vB @ vA).square() + (1 - beta2) * g.square()
        reference.decay_rms(state["rms_row"], g, 1, beta2)
        state["v_B"], state["v_A"] = reference.refresh(vB, vA, g.abs(), config.resolved_gammas[1], config)
        least = torch.finfo(g.dtype).tiny
        return state["rms_row"][:, None].square() / (1 - beta2**t) * (w + least) / (w.mean(1, keepdim=True) + least)
