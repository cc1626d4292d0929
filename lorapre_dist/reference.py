"""LoRA-Pre on dense matrices: the oracle that every other path is tested against.

Read it beside arXiv 2602.24283, Algorithm 1. ``g`` and ``theta`` are p x q, ``B`` p x r, ``A`` r x q,
``vB`` p x r_v, ``vA`` r_v x q; all right-hand sides are those of the step before unless they say "new".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LoRAPreConfig


def lorapre_adam_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreConfig) -> None:
    """One step of LoRA-Pre (Adam form) on one matrix, in place.

    Args:
        theta: parameter, p x q.
        g: its gradient, p x q.
        state: ``m_B`` (p x r), ``m_A`` (r x q), ``v_B`` (p x r_v), ``v_A`` (r_v x q), ``v_row`` (p; used by
            ``stable``) and ``step`` (0-d), as made by :func:`init_state`.
        config: the settings; ``config.lr`` is the learning rate of this step.
    """
    beta1, beta2 = config.betas
    gamma1, gamma2 = config.resolved_gammas
    state["step"] += 1
    t = int(state["step"])
    B, A, vB, vA = state["m_B"], state["m_A"], state["v_B"], state["v_A"]

    # The moments that the update reads: old factors and the fresh gradient.
    m = (beta1 * B @ A + (1 - beta1) * g) / (1 - beta1**t)
    w = beta2 * (vB @ vA).square() + (1 - beta2) * g.square()
    if config.variant == "stable":
        Y = solve_gram(A @ A.T, (g @ A.T).T, config).T
        m = m + config.resolved_residual * (g - Y @ A)
        state["v_row"].mul_(beta2).add_(g.square().mean(1), alpha=1 - beta2)
        energy = state["v_row"][:, None] / (1 - beta2**t)
        mean_w = w.mean(1, keepdim=True)
        v = torch.where(mean_w > 0, energy * w / torch.where(mean_w > 0, mean_w, 1), energy)
    else:
        if config.resolved_residual:
            m = m + config.resolved_residual * (g - solve_gram(A @ A.T, (g @ A.T).T, config).T @ A)
        v = w / (1 - beta2**t)

    state["m_B"], state["m_A"] = refresh(B, A, g, gamma1, config)
    state["v_B"], state["v_A"] = refresh(vB, vA, g.abs(), gamma2, config)
    theta.mul_(1 - config.lr * config.weight_decay)
    bound = config.resolved_max_update
    theta.sub_(config.lr * config.scale * (m / (v.sqrt() + config.eps)).clamp(-bound, bound))


def refresh(B: Tensor, A: Tensor, g: Tensor, gamma: float, config: LoRAPreConfig) -> tuple[Tensor, Tensor]:
    """Regress the factors on ``g``: ``B`` on the old ``A``; ``A`` on the new ``B`` (``paper``: on the old one)."""
    new_B = (1 - gamma) * B + gamma * solve_gram(A @ A.T, (g @ A.T).T, config).T
    left = new_B if config.variant == "stable" else B
    new_A = (1 - gamma) * A + gamma * solve_gram(left.T @ left, left.T @ g, config)
    return new_B, new_A


def solve_gram(gram: Tensor, rhs: Tensor, config: LoRAPreConfig) -> Tensor:
    """``(gram + damping)^-1 rhs``: gram r x r, rhs r x n. A zero Gram contributes a zero term."""
    damping = torch.as_tensor(config.resolved_damping, dtype=gram.dtype)
    if config.variant == "stable":
        damping = damping * gram.trace() / gram.shape[0]
        if damping == 0:
            return torch.zeros_like(rhs)
    eye = torch.eye(gram.shape[0], dtype=gram.dtype)
    return torch.cholesky_solve(rhs, torch.linalg.cholesky(gram + damping * eye))


def adamw_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreConfig) -> None:
    """One AdamW step in place, for the parameters that are not low-rank; ``state`` as in ``torch.optim.AdamW``."""
    beta1, beta2 = config.betas
    state["step"] += 1
    t = int(state["step"])
    state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).add_(g.square(), alpha=1 - beta2)
    v = state["exp_avg_sq"] / (1 - beta2**t)
    theta.mul_(1 - config.lr * config.weight_decay)
    theta.sub_(config.lr / (1 - beta1**t) * state["exp_avg"] / (v.sqrt() + config.eps))


def init_state(
    shape: tuple[int, int], config: LoRAPreConfig, m_A: Tensor, v_A: Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """State before the first step: ``B = vB = 0``, ``A`` (r x q) and ``vA`` (r_v x q) as given."""
    p = shape[0]
    return {
        "m_B": torch.zeros(p, config.rank, dtype=dtype),
        "m_A": m_A.to(dtype).clone(),
        "v_B": torch.zeros(p, config.resolved_rank_v, dtype=dtype),
        "v_A": v_A.to(dtype).clone(),
        "v_row": torch.zeros(p, dtype=dtype),
        "step": torch.zeros((), dtype=torch.int64),
    }
