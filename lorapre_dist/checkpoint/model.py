"""The tensors of a model that are not stepped: frozen parameters and persistent buffers."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from ..config.param_groups import clean_name
from ..layouts.base import local
from ..layouts.dtensor import piece, spread
from ..state.shards import Shard, Untrained, flat_shard
from .team import Team


def untrained(
    module: torch.nn.Module,
    trained: Container[str],
    frozen: bool = True,
    named: Callable[[str], str] = clean_name,
) -> dict[str, Untrained]:
    """This rank's part of every frozen parameter (unless ``frozen`` is False) and persistent buffer, by name.

    Args:
        trained: names of the parameters that are stepped, on any rank.
        named: gives a tensor's name in the checkpoint from that in ``module``.
    """
    found = {}
    for name, p in module.named_parameters():
        name = named(name)
        if name not in trained and frozen:
            shape = tuple(getattr(p, "ds_shape", p.shape))
            found[name] = Untrained(shape, _held(name, p, torch.Size(shape).numel()))
    persistent = set(module.state_dict().keys())
    for name, buffer in module.named_buffers():
        if name in persistent or clean_name(name) in persistent:
            found[named(name)] = Untrained(tuple(buffer.shape), Shard((buffer.numel(),), 0, buffer.view(-1)))
    return found


def _held(name: str, p: Any, numel: int) -> Shard:
    """This rank's run of a parameter."""
    if hasattr(p, "ds_tensor"):  # ZeRO-3
        part = p.partition_numel()
        start = min(numel, Team(p.ds_process_group).rank * part)
        return Shard((numel,), start, p.ds_tensor.data.view(-1)[: max(0, min(part, numel - start))])
    if isinstance(p, DTensor):
        held = piece(name, p, spread(name, p))
        return flat_shard(p, p.ndim) if held.split_inside else Shard((numel,), held.start, local(p).detach().view(-1))
    if getattr(p, "_fsdp_flattened", False):
        raise ConfigError(f"{name}: frozen parameters under FSDP1 cannot be saved; use FSDP2")
    return Shard((numel,), 0, p.detach().view(-1))


def aliases(module: torch.nn.Module, named: Callable[[str], str] = clean_name) -> dict[str, str]:
    """Names of tied parameters and the name under which each is saved; ``named`` as in :func:`untrained`."""
    first: dict[int, str] = {}
    found = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        name = named(name)
        if first.setdefault(id(p), name) != name:
            found[name] = first[id(p)]
    return found
