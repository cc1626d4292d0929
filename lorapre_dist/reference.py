"""LoRA-Pre on dense matrices: the oracle that every other path is tested against.

Read it beside arXiv 2602.24283, Algorithms 1 and 2. ``g`` and ``theta`` are p x q, ``B`` p x r, ``A`` r x q,
``vB`` p x r_v, ``vA`` r_v x q; all right-hand sides are those of the step before unless they say "new".

In ``stable`` every refresh ends in a gauge: the factors are changed, not their product, so that the rows of ``A`` are
orthonormal and its pseudo-inverse is ``A^T``. A gradient that is not finite must not come here: the step is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import (
    LoRAPreAdafactorConfig,
    LoRAPreConfig,
    LoRAPreLionConfig,
    LoRAPreMuonConfig,
    LoRAPreSGDConfig,
    LowRankConfig,
)


def lorapre_adam_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreConfig) -> None:
    """One step of LoRA-Pre (Adam form) on one matrix, in place.

    Args:
        theta: parameter, p x q.
        g: its gradient, p x q.
        state: ``m_B`` (p x r), ``m_A`` (r x q), ``v_B`` (p x r_v), ``v_A`` (r_v x q), ``rms_row`` (p; used by
            ``stable``) and ``step`` (0-d), as made by :func:`init_state`.
        config: the settings; ``config.lr`` is the learning rate of this step.
    """
    beta1, beta2 = config.betas
    gamma1, gamma2 = config.resolved_gammas
    g = cleaned(g)
    state["step"] += 1
    t = int(state["step"])
    B, A, vB, vA = state["m_B"], state["m_A"], state["v_B"], state["v_A"]

    # The moments that the update reads: old factors and the fresh gradient.
    m = (beta1 * B @ A + (1 - beta1) * g) / (1 - beta1**t)
    m = m + config.resolved_residual * residual(A, g, config)
    w = beta2 * (vB @ vA).square() + (1 - beta2) * g.square()
    if config.variant == "stable":
        decay_rms(state["rms_row"], g, 1, beta2)
        energy = state["rms_row"][:, None].square() / (1 - beta2**t)
        mean_w = w.mean(1, keepdim=True)
        v = torch.where(mean_w > 0, energy * w / torch.where(mean_w > 0, mean_w, 1), energy)
    else:
        v = w / (1 - beta2**t)

    state["m_B"], state["m_A"] = refresh(B, A, g, gamma1, config)
    state["v_B"], state["v_A"] = refresh(vB, vA, g.abs(), gamma2, config)
    theta.mul_(1 - config.lr * config.weight_decay)
    bound = config.resolved_max_update
    theta.sub_(config.lr * config.scale * (m / (v.sqrt() + config.eps)).clamp(-bound, bound))


def lorapre_muon_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreMuonConfig) -> None:
    """One step of LoRA-Pre (Muon form) on one matrix, in place; arguments as in :func:`lorapre_adam_step`.

    ``state`` has ``m_B``, ``m_A`` and ``step``.
    """
    mu = config.resolved_momentum
    g = cleaned(g)
    state["step"] += 1
    B, A = state["m_B"], state["m_A"]
    m = mu * B @ A + g  # old factors and the fresh gradient
    u = mu * m + g if config.resolved_nesterov else m
    # In torch.optim.Muon's scale, that of an average; orthogonalisation does not see it, but for its eps.
    u = (1 - mu) * u + config.resolved_residual * residual(A, g, config)
    # Heavy-ball momentum is an average divided by 1 - mu, and so is what the factors regress on.
    state["m_B"], state["m_A"] = refresh(B, A, g / (1 - mu), config.resolved_gamma, config)
    theta.mul_(1 - config.lr * config.weight_decay)
    theta.sub_(config.adjusted_lr((g.shape[0], g.shape[1])) * newton_schulz(u, config))


def lorapre_sgd_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreSGDConfig) -> None:
    """One step of SGD with a low-rank heavy-ball momentum on one matrix, in place; as :func:`lorapre_muon_step`."""
    mu = config.momentum
    g = cleaned(g)
    state["step"] += 1
    B, A = state["m_B"], state["m_A"]
    m = mu * B @ A + g
    u = mu * m + g if config.nesterov else m
    u = u + config.resolved_residual / (1 - mu) * residual(A, g, config)
    state["m_B"], state["m_A"] = refresh(B, A, g / (1 - mu), config.resolved_gamma, config)
    theta.mul_(1 - config.lr * config.weight_decay).sub_(config.lr * u)


def lorapre_lion_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreLionConfig) -> None:
    """One step of Lion with a low-rank momentum on one matrix, in place; as :func:`lorapre_muon_step`."""
    beta1, _ = config.betas
    g = cleaned(g)
    state["step"] += 1
    B, A = state["m_B"], state["m_A"]
    u = beta1 * B @ A + (1 - beta1) * g + config.resolved_residual * residual(A, g, config)
    state["m_B"], state["m_A"] = refresh(B, A, g, config.resolved_gamma, config)
    theta.mul_(1 - config.lr * config.weight_decay).sub_(config.lr * u.sign())


def lorapre_adafactor_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreAdafactorConfig) -> None:
    """One step of LoRA-Pre (Adam form) with Adafactor's second moment on one matrix, in place.

    ``state`` has ``m_B``, ``m_A``, ``rms_row`` (p), ``rms_col`` (q) and ``step``.
    """
    beta1, beta2 = config.betas
    g = cleaned(g)
    state["step"] += 1
    t = int(state["step"])
    B, A = state["m_B"], state["m_A"]
    m = (beta1 * B @ A + (1 - beta1) * g) / (1 - beta1**t)
    m = m + config.resolved_residual * residual(A, g, config)
    for name, dim in (("rms_row", 1), ("rms_col", 0)):
        decay_rms(state[name], g, dim, beta2)
    level = state["rms_col"].square().mean().clamp_min(torch.finfo(g.dtype).tiny)
    v = torch.outer(state["rms_row"].square(), state["rms_col"].square()) / level / (1 - beta2**t)
    state["m_B"], state["m_A"] = refresh(B, A, g, config.resolved_gammas[0], config)
    bound = config.resolved_max_update
    theta.mul_(1 - config.lr * config.weight_decay)
    theta.sub_(config.lr * config.scale * (m / (v.sqrt() + config.eps)).clamp(-bound, bound))


def newton_schulz(u: Tensor, config: LoRAPreMuonConfig) -> Tensor:
    """``u`` with its singular values brought near 1, as ``torch.optim.Muon`` does it."""
    a, b, c = config.ns_coefficients
    X = u / u.norm().clamp_min(config.eps)
    for _ in range(config.ns_steps):
        gram = X.T @ X
        X = a * X + X @ (b * gram + c * gram @ gram)
    return X


def cleaned(g: Tensor) -> Tensor:
    """``g``, in which an element that is 1e11 times as large as the others are counts as 0.

    What size those are is the second largest of 64 elements, spread over all rows and, by the golden ratio, columns.
    """
    p, q = g.shape
    sampled = {(k * p // 64, (k * 40503 % 2**16) * q // 2**16) for k in range(64)}
    typical = torch.stack([g[place] for place in sampled]).abs().topk(2).values[1]
    return g.masked_fill(g.abs() > 2**36 * typical, 0) if typical > 0 else g


def decay_rms(rms: Tensor, g: Tensor, dim: int, beta: float) -> None:
    """Root of the decayed mean of ``g^2`` along ``dim``, in place."""
    rms.copy_((beta * rms.square() + (1 - beta) * g.square().mean(dim)).sqrt())


def regress(A: Tensor, g: Tensor, config: LowRankConfig) -> Tensor:
    """``Y = g A^+`` (p x r): the least squares fit of ``Y A`` to ``g``, up to damping."""
    return g @ A.T if config.variant == "stable" else solve_gram(A @ A.T, (g @ A.T).T, config).T


def residual(A: Tensor, g: Tensor, config: LowRankConfig) -> Tensor:
    """The part of ``g`` outside the tracked subspace, up to damping."""
    return g - regress(A, g, config) @ A


def refresh(B: Tensor, A: Tensor, g: Tensor, gamma: float, config: LowRankConfig) -> tuple[Tensor, Tensor]:
    """Regress the factors on ``g``: ``B`` on the old ``A``; ``A`` on the new ``B`` (``paper``: on the old one)."""
    new_B = (1 - gamma) * B + gamma * regress(A, g, config)
    left = new_B if config.variant == "stable" else B
    new_A = (1 - gamma) * A + gamma * solve_gram(left.T @ left, left.T @ g, config)
    return gauge(new_B, new_A, config) if config.variant == "stable" else (new_B, new_A)


def gauge(B: Tensor, A: Tensor, config: LowRankConfig) -> tuple[Tensor, Tensor]:
    """``(B L, L^-1 A)`` with ``L L^T = A A^T + damping``: the same product, and orthonormal rows of A.

    Up to damping: ``A^T A`` becomes the projection ``A^T (A A^T + damping)^-1 A`` of before.
    """
    lower = torch.linalg.cholesky(damped(A @ A.T, config))
    return B @ lower, torch.linalg.solve_triangular(lower, A, upper=False)


def solve_gram(gram: Tensor, rhs: Tensor, config: LowRankConfig) -> Tensor:
    """``(gram + damping)^-1 rhs``: gram r x r, rhs r x n. A zero Gram contributes a zero term."""
    if config.variant == "stable" and gram.trace() == 0:
        return torch.zeros_like(rhs)
    return torch.cholesky_solve(rhs, torch.linalg.cholesky(damped(gram, config)))


def damped(gram: Tensor, config: LowRankConfig) -> Tensor:
    """``gram + d I``, ``d`` in ``stable`` relative to the mean eigenvalue, and no less than what rounding leaves."""
    mean = gram.trace() / gram.shape[0]
    damping = config.resolved_damping * (mean if config.variant == "stable" else torch.ones_like(mean))
    damping = torch.maximum(damping, torch.finfo(gram.dtype).eps * gram.trace())
    return gram + damping * torch.eye(gram.shape[0], dtype=gram.dtype)


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
    shape: tuple[int, int],
    config: LowRankConfig,
    m_A: Tensor,
    v_A: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """State before the first step: ``B = vB = 0``, ``A`` (r x q) and, where there is one, ``vA`` (r_v x q) as given.

    In ``stable`` they are brought into the gauge.
    """
    p, q = shape
    state = {"step": torch.zeros((), dtype=torch.int64)}
    for moment, A in (("m", m_A), ("v", v_A)):
        if A is not None:
            B, A = torch.zeros(p, A.shape[0], dtype=dtype), A.to(dtype).clone()
            state[f"{moment}_B"], state[f"{moment}_A"] = gauge(B, A, config) if config.variant == "stable" else (B, A)
    for name, size in (("rms_row", p), ("rms_col", q)):
        if (name == "rms_row" and v_A is not None) or name in config.vectors:
            state[name] = torch.zeros(size, dtype=dtype)
    return state
