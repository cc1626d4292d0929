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
        return roundings.Kahan(torch.zeros(piece.numel, dtype=torch.int16, device=device))
    if config.weights != "stochastic":
        return Rounding()
    start, width, stride, phase = piece.start, 1, 1, 0
    if piece.columns is not None:
        first, last = piece.columns
        row, begin = divmod(start, piece.shape[1])
        start, phase = row * piece.shape[1] + first, max(0, begin - first)
        width, stride = max(1, last - first), piece.shape[1]
    return roundings.stochastic(piece.name, config.seed, start, width, stride, device, phase)
