"""Which layout the parameters of a torch-native program have."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from . import ddp, dtensor, fsdp1, whole
from .base import Layout
from .matrices import LowRank

Named = Iterable[tuple[str, torch.Tensor, int]]


@dataclass(frozen=True)
class Place:
    """Where parameters lie, as far as this rank knows by itself.

    Attributes:
        kind: ``"DTensor"``, ``"FSDP1"``, ``"DDP"`` or ``"one device"``.
        alone: no other rank has a part in it.
        group: whose ranks bind their layouts together; None: all of the world.
        shares: ranks of the group with which this one shares parameters; None: all.
        shapes: of whole parameters by name.
        handles: of FSDP1's flat parameters.
    """

    kind: str
    alone: bool = True
    group: Any = None
    shares: frozenset[int] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    handles: tuple[Any, ...] = ()


def find(named: Named) -> Place:
    """Where the parameters lie, given as (name, tensor, index of its group); no collective."""
    named = list(named)
    shapes = {n: tuple(p.shape) for n, p, _ in named}
    if not (dist.is_available() and dist.is_initialized()):
        return Place("one device", shapes=shapes)
    meshes = {id(p.device_mesh): p.device_mesh for _, p, _ in named if isinstance(p, DTensor)}
    if meshes:
        shares = frozenset(rank for mesh in meshes.values() for rank in mesh.mesh.flatten().tolist())
        return Place("DTensor", len(shares) < 2, shares=shares, shapes=shapes)
    ours = {id(p): n for n, p, _ in named}
    if any(getattr(p, "_fsdp_flattened", False) for _, p, _ in named):
        living = _living("FlatParamHandle")
        handles = tuple(h for h in living if any(id(p) in ours for p in h.flat_param._params or ()))
        return Place("FSDP1", False, None, _fsdp1_ranks(handles), shapes | fsdp1.shapes(ours, handles), handles)
    module = data_parallel(named)
    if module is not None:
        return Place("DDP", False, module.process_group, shapes=shapes)
    return Place("one device", shapes=shapes)


def data_parallel(named: Named) -> Any:
    """The ``DistributedDataParallel`` of several ranks that has some of the parameters; None if there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    ours = {id(p) for _, p, _ in named}
    for module in _living("DistributedDataParallel"):
        if any(id(p) in ours for p in module.parameters()) and dist.get_world_size(module.process_group) > 1:
            return module
    return None


def layout(place: Place, named: Named, shard_state: bool, is_low_rank: LowRank) -> Layout:
    """The layout of parameters that lie so; a collective unless one rank is alone with them.

    Args:
        shard_state: deal out the state among the ranks of DistributedDataParallel.

    Raises:
        ConfigError: a placement that is not understood.
    """
    if place.kind == "DTensor":
        return dtensor.layout(named)
    if place.kind == "FSDP1":
        return fsdp1.layout(named, list(place.handles))
    if place.kind == "DDP":
        if shard_state:
            return ddp.layout(named, place.group, is_low_rank)
        return whole.layout(named, "DDP, replicated state")
    return whole.layout(named)


def check(groups: list[dict[str, Any]]) -> None:
    """Raise a ConfigError where the parameters of an optimizer's groups hide their matrices."""
    if any(getattr(p, "_is_flat_param", False) for group in groups for p in group["params"]):
        raise ConfigError("FSDP1 hides the matrices in flat parameters; wrap the model with use_orig_params=True")


def _fsdp1_ranks(handles: tuple[Any, ...]) -> frozenset[int]:
    """The ranks over which flat parameters are spread, and those that hold copies of the parts."""
    ids = {id(handle) for handle in handles}
    groups = [handle.process_group for handle in handles]
    for module in _living("FullyShardedDataParallel"):
        if id(getattr(module, "_handle", None)) in ids:
            groups.append(getattr(module, "_inter_node_pg", None))  # of hybrid sharding
    return frozenset(rank for group in groups if group is not None for rank in dist.get_process_group_ranks(group))


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
