"""Which ranks an engine shares parameters with, where data parallelism is but one of several axes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def sharing(engine: Any) -> list[int] | None:
    """The ranks that have this one's parameters; None: all of the world."""
    if engine.mpu is None or not dist.is_initialized():
        return None
    ranks: list[int] = dist.get_process_group_ranks(engine.mpu.get_data_parallel_group())
    return ranks if len(ranks) < dist.get_world_size() else None


def beyond(engine: Any) -> list[Any]:
    """Groups of ranks that step together and have other parameters."""
    group = engine.mpu.get_model_parallel_group() if engine.mpu is not None else None
    return [group] if group is not None and dist.get_world_size(group) > 1 else []
