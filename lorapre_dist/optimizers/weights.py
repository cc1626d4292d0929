"""The option ``weights``: which parameters it is for, and how each piece of one is kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..config import ConfigError, LowRankConfig
from ..config.options import SIXTEEN
from ..core import rounding as roundings
from ..core.rounding import Rounding
from ..layouts.base import Layout, Piece
from .tensors import may_step


def check(weights: str | None, named: Iterable[tuple[str, Tensor]], layout: Layout | None = None) -> None:
    """Raise a ConfigError unless the option ``weights`` is one for these parameters of a group.

    Args:
        layout: where an engine lets the optimizer step, if it does.
    """
    if weights not in SIXTEEN:
        return
    for name, tensor in named:
        if tensor.dtype == torch.bfloat16 or not may_step(tensor):
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if layout is None or layout.native:
            raise ConfigError(
                f"weights={weights!r}: parameter {name} is {kind}; it is for bf16 weights: convert the model, "
                "model.to(torch.bfloat16), before the optimizer is made, or put the parameter in a group with "
                "weights='master'"
            )
        raise ConfigError(
            f"weights={weights!r}: under {layout.name} the engine lets the optimizer step {kind} weights; set "
            "bf16.enabled and bf16.bf16_master_weights_and_grads, and take ZeRO stage 1, 2 or 3"
        )


def rounding(config: LowRankConfig, piece: Piece, device: torch.device) -> Rounding:
    """How a piece's weights are kept, by the settings of its group."""
    if config.weights == "kahan":
        if piece.columns is not None and piece.parameter is not None and piece.parameter.ndim > 2:
            raise ConfigError(
                f"{piece.name}: weights='kahan' cannot be saved of experts that are split by columns: use "
                "weights='stochastic', or shard them along dim 0 or 1"
            )
        return roundings.Kahan(torch.zeros(piece.numel, dtype=torch.int16, device=device))
    if config.weights != "stochastic":
        return Rounding()
    runs = piece.runs
    if runs is None:
        raise ConfigError(
            f"{piece.name}: weights='stochastic' under AdamW is for a parameter that is split along dim 0 and one "
            "other at most: use weights='kahan', or another placement"
        )
    start, width, stride, phase = runs
    return roundings.stochastic(piece.name, config.seed, start, width, stride, device, phase)
