"""Which layout the parameters of a torch-native program have."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from . import ddp, dtensor, fsdp1, whole
from .base import Layout
from .matrices import LowRank

Named = Iterable[tuple[str, torch.Tensor, int]]

#: Classes of the stages of pipelines.
_STAGES = ("PipelineStage", "_PipelineStage")


@dataclass(frozen=True)
class Place:
    """Where parameters lie, as far as this rank knows by itself.

    Attributes:
        kind: ``"DTensor"``, ``"FSDP1"``, ``"DDP"`` or ``"one device"``.
        alone: no other rank has a part in the model.
        group: whose ranks bind their layouts together; None: all of the world.
        shares: ranks of the group with which this one shares parameters; None: all.
        beyond: see :attr:`lorapre_dist.layouts.base.Layout.beyond`.
        shapes: of whole parameters by name.
        handles: of FSDP1's flat parameters.
        copies: the process group of DistributedDataParallel.
    """

    kind: str
    alone: bool = True
    group: Any = None
    shares: frozenset[int] | None = None
    beyond: tuple[Any, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    handles: tuple[Any, ...] = ()
    copies: Any = None


def find(named: Named) -> Place:
    """Where the parameters lie, given as (name, tensor, index of its group); no collective."""
    named = list(named)
    shapes = {n: tuple(p.shape) for n, p, _ in named}
    if not (dist.is_available() and dist.is_initialized()):
        return Place("one device", shapes=shapes)
    ours = {id(p): n for n, p, _ in named}
    meshes = {id(p.device_mesh): p.device_mesh for _, p, _ in named if isinstance(p, DTensor)}
    beyond, shares = _pipelines(ours), frozenset([dist.get_rank()])
    if meshes:
        shares = frozenset(rank for mesh in meshes.values() for rank in mesh.mesh.flatten().tolist())
        beyond = tuple(_beyond(meshes.values(), shares)) or beyond
        alike = all(mesh.ndim == 1 and mesh.size() == len(shares) for mesh in meshes.values())
        if alike and not beyond and len(shares) < dist.get_world_size():
            # Of several groups side by side each binds by itself.
            return Place("DTensor", len(shares) < 2, next(iter(meshes.values())).get_group(), shapes=shapes)
        return Place("DTensor", False, shares=shares, beyond=beyond, shapes=shapes)
    if any(getattr(p, "_fsdp_flattened", False) for _, p, _ in named):
        living = _living("FlatParamHandle")
        handles = tuple(h for h in living if any(id(p) in ours for p in h.flat_param._params or ()))
        shapes |= fsdp1.shapes(ours, handles)
        return Place("FSDP1", False, None, _fsdp1_ranks(handles), beyond, shapes, handles)
    module = data_parallel(named)
    if module is not None:
        group = module.process_group
        if not beyond:
            return Place("DDP", False, group, shapes=shapes, copies=group)
        shares = frozenset(dist.get_process_group_ranks(group))
        return Place("DDP", False, None, shares, beyond, shapes, copies=group)
    return Place("one device", not beyond, shares=shares, beyond=beyond, shapes=shapes)


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
    found = _layout(place, named, shard_state, is_low_rank)
    found.native, found.beyond = True, list(place.beyond)
    found.joint, found.together = not place.alone and place.group is None, place.group
    return found


def _layout(place: Place, named: Named, shard_state: bool, is_low_rank: LowRank) -> Layout:
    if place.kind == "DTensor":
        return dtensor.layout(named)
    if place.kind == "FSDP1":
        return fsdp1.layout(named, list(place.handles))
    if place.kind == "DDP":
        if shard_state:
            return ddp.layout(named, place.copies, is_low_rank)
        return whole.layout(named, "DDP, replicated state")
    return whole.layout(named)


def check(groups: list[dict[str, Any]]) -> None:
    """Raise a ConfigError where the parameters of an optimizer's groups hide their matrices."""
    if any(getattr(p, "_is_flat_param", False) for group in groups for p in group["params"]):
        raise ConfigError("FSDP1 hides the matrices in flat parameters; wrap the model with use_orig_params=True")


def _pipelines(ours: Container[int]) -> tuple[Any, ...]:
    """The groups of the pipelines of which some of our parameters, by their ids, are a stage."""
    groups = [stage.group or dist.group.WORLD for name in _STAGES for stage in _living(name) if _has(stage, ours)]
    return tuple({id(group): group for group in groups if dist.get_world_size(group) > 1}.values())


def _has(stage: Any, ours: Container[int]) -> bool:
    return any(id(p) in ours for p in stage.submod.parameters())


def _beyond(meshes: Iterable[Any], shares: frozenset[int]) -> Iterator[Any]:
    """Groups that lead to the ranks of the meshes of which these are parts, unless they have no further ones."""
    roots = {id(root): root for root in map(_root, meshes)}
    for root in roots.values():
        ranks = root.mesh.flatten().tolist()
        if set(ranks) <= shares:
            continue
        if len(ranks) == dist.get_world_size():
            yield dist.group.WORLD
        else:
            yield from (root.get_group(d) for d in range(root.ndim) if root.size(d) > 1)


def _root(mesh: Any) -> Any:
    """The mesh of which another one is a part."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    return device_mesh._mesh_resources.get_root_mesh(mesh)  # before PyTorch 2.10


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
