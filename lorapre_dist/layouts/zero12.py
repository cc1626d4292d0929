"""DeepSpeed ZeRO-1/2 and its BF16 optimizer: a flat buffer per parameter group, cut into equal parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from .base import Layout, Piece, SubGroups, Unit
from .geometry.ranges import holders

Placed = Iterable[tuple[str, tuple[int, ...], int]]  # name, shape, offset in the group's flat buffer


def flat_group(flat: torch.Tensor, group_index: int, placed: Placed, partition_size: int, groups: SubGroups) -> Unit:
    """The unit of one flat buffer, of which every rank steps ``partition_size`` consecutive elements (``flat``)."""
    pieces = []
    for name, shape, offset in placed:
        numel = torch.Size(shape).numel()
        held = holders(offset, offset + numel, partition_size)
        ranges = [held.get(k, (0, 0)) for k in range(groups.size)]
        start, stop = ranges[groups.rank]
        peers = groups.peers(ranges) if len(shape) in (2, 3) else None
        if start < stop:
            at = offset + start - groups.rank * partition_size
            pieces.append(Piece(name, shape, start, stop, at, peers))
    return Unit(flat, group_index, pieces)


def layout(zero: Any, names: dict[torch.nn.Parameter, str]) -> Layout:
    """The layout of a ``DeepSpeedZeroOptimizer`` (stages 1 and 2)."""
    made = Layout(f"ZeRO-{2 if zero.partition_gradients else 1}", lists_all=False)
    subgroups: dict[int, SubGroups] = {}
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        group = zero.real_dp_process_group[i]
        groups = subgroups.setdefault(id(group), SubGroups(group))
        made.known[groups.ranks] = group
        params, offsets = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
        placed = [(names[p], tuple(p.shape), at) for p, at in zip(params, offsets, strict=True)]
        made.units.append(flat_group(flat, i, placed, zero.partition_size[i], groups))
        made.world_size = max(made.world_size, dist.get_world_size(group))
    return made


def bf16_layout(bf16: Any, names: dict[torch.nn.Parameter, str]) -> Layout:
    """The layout of a ``BF16_Optimizer`` (what DeepSpeed makes of ZeRO-1 with bf16 weights and fp32 gradients)."""
    made = Layout("ZeRO-1 (bf16)", lists_all=False)
    subgroups: dict[int, SubGroups] = {}
    for i, flat in enumerate(bf16.fp32_groups_flat_partition):
        group = bf16.real_dp_process_group[i]
        groups = subgroups.setdefault(id(group), SubGroups(group))
        made.known[groups.ranks] = group
        placed, at = [], 0
        for p in bf16.bf16_groups[i]:
            placed.append((names[p], tuple(p.shape), at))
            at += p.numel()
        made.units.append(flat_group(flat, i, placed, flat.numel(), groups))
        made.world_size = max(made.world_size, dist.get_world_size(group))
    return made
