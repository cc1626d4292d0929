"""Which ranks an engine shares parameters with, where data parallelism is but one of several axes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .names import expert_layers


def sharing(engine: Any) -> list[int] | None:
    """The ranks that have this one's parameters; None: all of the world."""
    if not _has_model_axes(engine) or not dist.is_initialized():
        return None
    ranks: list[int] = dist.get_process_group_ranks(engine.mpu.get_data_parallel_group())
    return ranks if len(ranks) < dist.get_world_size() else None


def beyond(engine: Any) -> list[Any]:
    """Groups of ranks that step together and have other parameters."""
    groups = [engine.mpu.get_model_parallel_group()] if _has_model_axes(engine) else []
    return [group for group in (*groups, *of_experts(engine)) if dist.get_world_size(group) > 1]


def of_experts(engine: Any) -> list[Any]:
    """Groups of ranks that have other experts each, one for each ``ep_size``."""
    return list(dict.fromkeys(layer.ep_group for _, layer in expert_layers(engine.module)))


def tensor_parallel(engine: Any) -> Any:
    """The group of ranks that hold parts of the same matrices; None if there is one such rank."""
    if not _has_model_axes(engine):
        return None
    mpu = engine.mpu
    for name in ("get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group"):
        if hasattr(mpu, name):
            group = getattr(mpu, name)()
            return group if group is not None and dist.get_world_size(group) > 1 else None
    return None


def _has_model_axes(engine: Any) -> bool:
    """Whether ranks hold other parts of the model; there is an ``mpu`` that only says who shares sequences."""
    return engine.mpu is not None and not hasattr(engine.mpu, "initialize_sequence_parallel")
