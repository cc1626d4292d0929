"""The dense reference optimizers over a whole model's parameters by name: what every layout is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorapre_dist import reference
from lorapre_dist.config import (
    LoRAPreAdafactorConfig,
    LoRAPreConfig,
    LoRAPreLionConfig,
    LoRAPreMuonConfig,
    LoRAPreSGDConfig,
    LowRankConfig,
    MomentumConfig,
)
from lorapre_dist.core.factors import initial_A

STEPS: dict[type[LowRankConfig], Callable[..., None]] = {
    LoRAPreConfig: reference.lorapre_adam_step,
    LoRAPreMuonConfig: reference.lorapre_muon_step,
    LoRAPreSGDConfig: reference.lorapre_sgd_step,
    LoRAPreLionConfig: reference.lorapre_lion_step,
    LoRAPreAdafactorConfig: reference.lorapre_adafactor_step,
}


def init_matrix(name: str, shape: tuple[int, int], config: LowRankConfig) -> dict[str, Any]:
    """State of one matrix before the first step."""
    initial = {
        moment: initial_A(name, moment, rank, shape[1], config.init_std, config.seed)
        for moment, rank in config.ranks.items()
    }
    return reference.init_state(shape, config, initial["m"], initial.get("v"))


def init(
    theta: dict[str, torch.Tensor], config: LowRankConfig, low_rank: Callable[[str, torch.Tensor], bool]
) -> dict[str, dict[str, Any]]:
    """State of every parameter before the first step; ``low_rank`` says which matrices have factors."""
    state: dict[str, dict[str, Any]] = {}
    for name, p in theta.items():
        if low_rank(name, p):
            state[name] = init_matrix(name, (p.shape[0], p.shape[1]), config)
        else:
            zeros = torch.zeros_like(p)
            state[name] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros((), dtype=torch.int64)}
    return state


def step(
    theta: dict[str, torch.Tensor],
    grads: dict[str, torch.Tensor],
    state: dict[str, dict[str, Any]],
    config: LowRankConfig,
    base_lr: float | None = None,
) -> None:
    """One step of every parameter, in place; ``base_lr`` is what ``config.lr`` began as."""
    other = adamw_of(config, base_lr or config.lr) if isinstance(config, MomentumConfig) else config
    for name, p in theta.items():
        if "m_B" in state[name]:
            STEPS[type(config)](p, grads[name], state[name], config)
        else:
            reference.adamw_step(p, grads[name], state[name], other)


def adamw_of(config: MomentumConfig, base_lr: float) -> LoRAPreConfig:
    """Settings of AdamW for what is no matrix, where an ``lr`` of ``base_lr`` means all of ``adamw_lr``."""
    lr = config.adamw_lr * (config.lr / base_lr)
    return LoRAPreConfig(lr, config.adamw_weight_decay, betas=config.adamw_betas, eps=config.adamw_eps)


def each_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the matrices in stacks, other tensors as they are."""
    found = {}
    for name, tensor in tensors.items():
        found.update({f"{name}[{e}]": part for e, part in enumerate(tensor)} if tensor.ndim == 3 else {name: tensor})
    return found
