"""Warnings about settings that are allowed and seldom meant, once, on rank 0."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from ..config import LowRankConfig


def of_small_steps(config: LowRankConfig) -> None:
    """Warn of a learning rate at which next to nothing is learned."""
    if 0.0 < config.step_size < config.least_step_size:
        scale = getattr(config, "scale", None)
        what = f"lr={config.lr:g}" if scale is None else f"lr={config.lr:g} times scale={scale:g}"
        usual = "" if scale is None else f" (as AdamW at lr {config.step_size:.2g}; scale=1 takes AdamW's lr)"
        _warn(f"{what}: steps of matrices are so small that training from scratch barely learns{usual}; raise lr")


def of_missing_names(name: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """Warn that matrices (``shapes`` by place) were taken without names, so embeddings and the output layer with them.

    Args:
        name: of the optimizer.
    """
    place, (p, q) = max(shapes.items(), key=lambda item: max(item[1]))
    _warn(
        f"the parameters have no names, so all {len(shapes)} matrices are low-rank, embeddings and the output layer "
        f"with them (is {place}, {p} x {q}, one?); {name}(model, ...) leaves those to AdamW"
    )


def _warn(text: str) -> None:
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        warnings.warn(text, stacklevel=4)
