"""DeepSpeed ZeRO-3: every parameter flattened and cut into equal padded parts, packed by sub-group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..core.interval import Peers
from .base import Layout, Piece, Unit
from .geometry.ranges import equal_ranges


def layout(zero: Any, names: dict[torch.nn.Parameter, str]) -> Layout:
    """The layout of a ``DeepSpeedZeroOptimizer_Stage3``; every rank takes part in every matrix, even with nothing."""
    made = Layout("ZeRO-3")
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        group = zero.sub_group_process_groups[i]
        ranks, rank = tuple(dist.get_process_group_ranks(group)), dist.get_rank(group)
        size, made.known[ranks] = len(ranks), group
        pieces, offset = [], 0
        for p in zero.fp16_groups[i]:
            part, numel = p.partition_numel(), p.ds_numel
            ranges = equal_ranges(numel, size)
            peers = Peers(ranks, ranges, rank) if size > 1 and len(p.ds_shape) in (2, 3) else None
            pieces.append(Piece(names[p], tuple(p.ds_shape), *ranges[rank], offset, peers))
            offset += part
        made.units.append(Unit(flat, zero.sub_group_to_group_id[i], pieces))
        made.world_size = max(made.world_size, size)
    return made
