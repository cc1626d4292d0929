"""Which layout the parameters of a torch-native program have."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from . import ddp, dtensor, fsdp1, whole
from .base import Layout
from .matrices import LowRank

Named = Iterable[tuple[str, torch.Tensor, int]]


def layout(named: Named, shard_state: bool, is_low_rank: LowRank) -> Layout:
    """The layout of (name, tensor, index of its group); a collective where ``torch.distributed`` is initialised.

    Args:
        shard_state: deal out the state among the ranks of DistributedDataParallel.

    Raises:
        ConfigError: a placement that is not understood.
    """
    named = list(named)
    if not (dist.is_available() and dist.is_initialized()):
        return whole.layout(named)
    if any(isinstance(p, DTensor) for _, p, _ in named):
        return dtensor.layout(named)
    ours = {id(p) for _, p, _ in named}
    if any(getattr(p, "_fsdp_flattened", False) for _, p, _ in named):
        handles = [h for h in _living("FlatParamHandle") if any(id(p) in ours for p in h.flat_param._params or ())]
        return fsdp1.layout(named, handles)
    if dist.get_world_size() > 1:
        for module in _living("DistributedDataParallel"):
            if any(id(p) in ours for p in module.parameters()) and dist.get_world_size(module.process_group) > 1:
                if shard_state:
                    return ddp.layout(named, module.process_group, is_low_rank)
                return whole.layout(named, "DDP, replicated state")
    return whole.layout(named)


def check(groups: list[dict[str, Any]]) -> None:
    """Raise a ConfigError where the parameters of an optimizer's groups hide their matrices."""
    if any(getattr(p, "_is_flat_param", False) for group in groups for p in group["params"]):
        raise ConfigError("FSDP1 hides the matrices in flat parameters; wrap the model with use_orig_params=True")


def _living(class_name: str) -> list[Any]:
    """Objects of a class of ``torch.distributed`` or ``torch.nn.parallel``.

    A parameter does not know the DDP or FSDP1 module that it is in, and optimizers are given parameters alone.
    """
    found = []
    for thing in gc.get_objects():
        cls = type(thing)
        if cls.__name__ == class_name and cls.__module__.startswith("torch."):
            found.append(thing)
    return found
