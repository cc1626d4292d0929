"""Shapes of a preset's low-rank matrices, and what their state takes by the formula of the README."""

from __future__ import annotations

import functools

import torch
from transformers import AutoModelForCausalLM

from lorapre_dist.training.engines.models import preset_config


@functools.cache
def projections(preset: str) -> list[tuple[str, tuple[int, int]]]:
    """Name and shape of every attention and MLP projection, in the model's order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(preset))
    return [(name, (p.shape[0], p.shape[1])) for name, p in model.named_parameters() if "_proj." in name]


def state_bytes(preset: str, rank: int, rank_v: int) -> int:
    """Bytes of all ranks' state together: fp32 factors and row energies, ``4 ((r + r_v)(p + q) + p)`` a matrix."""
    return sum(4 * ((rank + rank_v) * (p + q) + p) for _, (p, q) in projections(preset))
