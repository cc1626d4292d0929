"""The dense reference optimizer over a whole model's parameters by name: what every layout is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorapre_dist import reference
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.core.factors import initial_At


def init(
    theta: dict[str, torch.Tensor], config: LoRAPreConfig, low_rank: Callable[[str, torch.Tensor], bool]
) -> dict[str, dict[str, Any]]:
    """State of every parameter before the first step; ``low_rank`` says which matrices have factors."""
    state: dict[str, dict[str, Any]] = {}
    for name, p in theta.items():
        if low_rank(name, p):
            m_A = initial_At(name, "m", p.shape[1], config.rank, config.init_std, config.seed).T
            v_A = initial_At(name, "v", p.shape[1], config.resolved_rank_v, config.init_std, config.seed).T
            state[name] = reference.init_state((p.shape[0], p.shape[1]), config, m_A, v_A)
        else:
            zeros = torch.zeros_like(p)
            state[name] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros((), dtype=torch.int64)}
    return state


def step(
    theta: dict[str, torch.Tensor],
    grads: dict[str, torch.Tensor],
    state: dict[str, dict[str, Any]],
    config: LoRAPreConfig,
) -> None:
    """One step of every parameter, in place."""
    for name, p in theta.items():
        update = reference.lorapre_adam_step if "m_B" in state[name] else reference.adamw_step
        update(p, grads[name], state[name], config)


def each_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the matrices in stacks, other tensors as they are."""
    found = {}
    for name, tensor in tensors.items():
        found.update({f"{name}[{e}]": part for e, part in enumerate(tensor)} if tensor.ndim == 3 else {name: tensor})
    return found
