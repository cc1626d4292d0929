"""DTensors: FSDP2 (``fully_shard``, 1-D and HSDP meshes), tensor parallel ``Shard(0)`` and ``Shard(1)``, and both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..config import ConfigError
from ..core.comm import all_ranks
from ..core.interval import Peers, Range
from .base import Layout, Piece, Unit, local


@dataclass(frozen=True)
class Block:
    """What this rank holds of a DTensor: whole slices of dim 0 from ``start`` to ``stop`` (elements), some columns."""

    start: int
    stop: int
    columns: Range | None
    group: Any


def layout(named: Iterable[tuple[str, torch.Tensor, int]]) -> Layout:
    """A layout of DTensors and whole tensors, given as (name, tensor, index of its group); a collective.

    Raises:
        ConfigError: a placement that is not understood.
    """
    named = list(named)
    blocks = {n: block(n, p) for n, p, _ in named if isinstance(p, DTensor)}
    ranges = _all_ranges(blocks)
    made = Layout("DTensor")
    for name, p, group in named:
        shape = tuple(p.shape)
        held = blocks.get(name)
        if held is None:
            piece = Piece(name, shape, 0, p.numel(), 0)
        else:
            peers = None
            if held.group is not None and len(shape) in (2, 3):
                rows = tuple(row_range for row_range, _ in ranges[name])
                columns = None
                if any(some is not None for _, some in ranges[name]):
                    columns = tuple(some or (0, shape[1]) for _, some in ranges[name])
                peers = Peers(held.group, rows, dist.get_rank(held.group), columns)
            parameter = p if held.columns is not None else None
            piece = Piece(name, shape, held.start, held.stop, 0, peers, held.columns, parameter=parameter)
            if held.group is not None:
                made.world_size = max(made.world_size, dist.get_world_size(held.group))
        made.units.append(Unit(p, group, [piece]))
    meshes = [(p.device_mesh, d) for _, p, _ in named if isinstance(p, DTensor) for d in _sharded(p)]
    found = {id(group): group for mesh, d in meshes if mesh.size(d) > 1 for group in [mesh.get_group(d)]}
    made.spread_over = list(found.values())
    return made


def block(name: str, p: DTensor) -> Block:
    """What this rank holds of a DTensor.

    Raises:
        ConfigError: a placement that is not understood.
    """
    dims = {p.placements[d].dim % max(1, p.ndim) for d in _sharded(p)}  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in p.placements):
        raise ConfigError(f"{name}: a parameter with placements {p.placements} is not supported")
    if dims - {0} and not (dims <= {0, 1} and p.ndim == 2):
        raise ConfigError(f"{name}: placements {p.placements} split a {p.ndim}-D parameter; use Shard(0)")
    sizes, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    if tuple(sizes) != tuple(local(p).shape):
        raise ConfigError(f"{name}: holds {tuple(local(p).shape)}, its placements {p.placements} say {tuple(sizes)}")
    group = shard_group(p)
    inner = p.shape[1:].numel()
    start = offsets[0] * inner if p.ndim else 0
    stop = start + (sizes[0] * inner if p.ndim else 1)
    columns = (offsets[1], offsets[1] + sizes[1]) if 1 in dims else None
    if columns and columns[0] == columns[1]:
        columns = (min(columns[0], p.shape[1]),) * 2
    return Block(min(start, p.numel()), min(stop, p.numel()), columns, group)


def shard_group(p: DTensor) -> Any:
    """The process group of the ranks that a DTensor is spread over; None if that is one rank."""
    mesh: Any = p.device_mesh
    dims = [d for d in _sharded(p) if mesh.size(d) > 1]
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if mesh.size() == dist.get_world_size() and all(d in dims or mesh.size(d) == 1 for d in range(mesh.ndim)):
        return dist.group.WORLD
    return mesh[tuple(mesh.mesh_dim_names[d] for d in dims)]._flatten().get_group()


def _sharded(p: DTensor) -> list[int]:
    """Dimensions of the mesh over which a DTensor is spread."""
    # The placement of FSDP2 over tensor parallel is no Shard to is_shard().
    return [d for d, placement in enumerate(p.placements) if hasattr(placement, "dim")]


def _all_ranges(blocks: dict[str, Block]) -> dict[str, list[tuple[Range, Range | None]]]:
    """Rows and columns that every rank of each parameter's group holds: one exchange a group."""
    groups: dict[int, tuple[Any, dict[str, tuple[Range, Range | None]]]] = {}
    for name, block in blocks.items():
        if block.group is not None:
            _, mine = groups.setdefault(id(block.group), (block.group, {}))
            mine[name] = ((block.start, block.stop), block.columns)
    found: dict[str, list[tuple[Range, Range | None]]] = {}
    for group, mine in groups.values():
        everyone = all_ranks(mine, group)
        for name in mine:
            found[name] = [theirs[name] for theirs in everyone]
    return found
