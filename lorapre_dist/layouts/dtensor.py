"""DTensors: FSDP2 (``fully_shard``, 1-D and HSDP meshes), tensor and expert parallelism, and any of these together.

A rank holds a box of each parameter, on whatever mesh. Boxes follow from shape, mesh and placements alone, so that
nothing has to be exchanged. Ranks that hold other parameters, as the stages of a pipeline do, are known by the mesh of
which a parameter's own is a part.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from ..config import ConfigError
from ..core.interval import Peers
from .base import Layout, Piece, Spread, Unit, local
from .geometry.ranges import Box, are_grid, matrix_parts


def layout(named: Iterable[tuple[str, torch.Tensor, int]]) -> Layout:
    """A layout of DTensors and whole tensors, given as (name, tensor, index of its group).

    Raises:
        ConfigError: a placement that is not understood.
    """
    named = list(named)
    made = Layout("DTensor")
    for name, p, group in named:
        if not isinstance(p, DTensor):
            made.units.append(Unit(p, group, [Piece(name, tuple(p.shape), 0, p.numel(), 0)]))
            continue
        found = spread(name, p)
        made.units.append(Unit(p, group, [piece(name, p, found)]))
        if len(found.ranks) > 1:
            made.world_size = max(made.world_size, len(found.ranks))
            made.units[-1].over = found.ranks if p.ndim == 3 else None
    meshes = [(p.device_mesh, d) for _, p, _ in named if isinstance(p, DTensor) for d in _sharded(p)]
    found_groups = {id(group): group for mesh, d in meshes for group in [mesh.get_group(d)]}
    made.spread_over = list(found_groups.values())
    made.known = {tuple(dist.get_process_group_ranks(group)): group for group in made.spread_over}
    return made


def piece(name: str, p: DTensor, found: Spread) -> Piece:
    """This rank's piece of a parameter, and its peers where that is a matrix, or may be a stack of some."""
    shape, own, shared = tuple(p.shape), found.own, len(found.ranks) > 1
    if not shape:
        return Piece(name, shape, 0, 1, 0)
    inner = math.prod(shape[1:])
    start, stop = own[0][0] * inner, own[0][1] * inner
    if len(shape) == 2:
        rows, columns = matrix_parts(shape, found.boxes)
        peers = Peers(found.ranks, rows, found.index, columns) if shared else None
        held = None if columns is None else columns[found.index]
        return Piece(name, shape, start, stop, 0, peers, held, parameter=None if columns is None else p)
    if any(box[1:] != tuple((0, size) for size in shape[1:]) for box in found.boxes):
        if any(low == high for (low, high), *_ in found.boxes):  # to be saved, ranks of a slice bring it into rows
            raise ConfigError(
                f"{name}: its {shape[0]} matrices lie on more ranks than that, which split them as well: take at most "
                f"{shape[0]} ranks for dim 0, or split along it alone"
            )
        return Piece(name, shape, start, stop, 0, parameter=p, spread=found)
    ranges = tuple((box[0][0] * inner, box[0][1] * inner) for box in found.boxes)
    peers = Peers(found.ranks, ranges, found.index) if shared and len(shape) == 3 else None
    return Piece(name, shape, start, stop, 0, peers)


def spread(name: str, p: DTensor) -> Spread:
    """How a DTensor lies on the ranks that it is spread over.

    Raises:
        ConfigError: a placement that is not understood.
    """
    mesh: Any = p.device_mesh
    if any(placement.is_partial() for placement in p.placements):
        raise ConfigError(f"{name}: a parameter with placements {p.placements} is not supported")
    ranks, index = _ranks(mesh, tuple(_sharded(p)))
    boxes = _boxes(tuple(p.shape), tuple(mesh.shape), tuple(p.placements), tuple(_sharded(p)))
    order = sorted(range(len(ranks)), key=lambda k: ranks[k])  # that of a process group
    found = Spread(tuple(ranks[k] for k in order), tuple(boxes[k] for k in order), order.index(index))
    held = tuple(high - low for low, high in found.own)
    if held != tuple(local(p).shape) or not are_grid(p.shape, boxes):
        raise ConfigError(
            f"{name}: holds {tuple(local(p).shape)} where its placements {p.placements} say {held}: "
            "a parameter must be cut into boxes, as Shard and FSDP2 cut it"
        )
    return found


def _ranks(mesh: Any, dims: tuple[int, ...]) -> tuple[list[int], int]:
    """The ranks of a mesh that differ from this one along some dimensions alone, and this one's place among them."""
    coordinate = mesh.get_coordinate()
    part = mesh.mesh[tuple(slice(None) if d in dims else at for d, at in enumerate(coordinate))]
    ranks = part.reshape(-1).tolist()
    return ranks, ranks.index(dist.get_rank())


@functools.lru_cache(maxsize=256)
def _boxes(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], dims: tuple[int, ...]
) -> tuple[Box, ...]:
    """The box of each rank along some dimensions of a mesh; of an empty one both sides are the same."""
    found = []
    for at in itertools.product(*(range(size) if d in dims else [0] for d, size in enumerate(mesh))):
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, list(at), placements)
        lows = [min(low, size) for low, size in zip(offsets, shape, strict=True)]
        found.append(tuple((low, low + size) for low, size in zip(lows, sizes, strict=True)))
    return tuple(found)


def _sharded(p: DTensor) -> list[int]:
    """Dimensions of a DTensor's mesh, of several ranks, over which it is split."""
    return [d for d, placement in enumerate(p.placements) if hasattr(placement, "dim") and p.device_mesh.size(d) > 1]
