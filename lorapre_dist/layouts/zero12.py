"""DeepSpeed ZeRO-1/2 and its BF16 optimizer: a flat buffer per parameter group, cut into equal parts.

A buffer is cut over the ranks of its data-parallel group, which may be any ranks: under a pipeline each stage has a
group of its own, and experts have others than the rest of a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..core.interval import Peers
from .base import Layout, Piece, Unit
from .geometry.ranges import holders
from .geometry.shares import turn

Placed = Iterable[tuple[str, tuple[int, ...], int]]  # name, shape, offset in the group's flat buffer


@dataclass(frozen=True)
class Buffer:
    """A flat buffer, of which each rank of ``group`` steps ``partition_size`` consecutive elements (``flat``)."""

    flat: torch.Tensor
    placed: Placed
    partition_size: int
    group: Any


def unit(buffer: Buffer, index: int) -> Unit:
    """Of a buffer; ``index`` is that of its parameter group."""
    members, rank = tuple(dist.get_process_group_ranks(buffer.group)), dist.get_rank(buffer.group)
    pieces = []
    for name, shape, offset in buffer.placed:
        held = holders(offset, offset + torch.Size(shape).numel(), buffer.partition_size)
        if rank not in held:
            continue
        at, peers = offset + held[rank][0] - rank * buffer.partition_size, None
        if len(held) > 1 and len(shape) in (2, 3):
            order = turn(min(held), len(held), len(members))
            ranks = tuple(members[k] for k in held)
            peers = Peers(ranks, tuple(held.values()), list(held).index(rank), turn=order)
        pieces.append(Piece(name, shape, *held[rank], at, peers))
    return Unit(buffer.flat, index, pieces)


def layout(zero: Any, names: dict[torch.nn.Parameter, str]) -> Layout:
    """The layout of a ``DeepSpeedZeroOptimizer`` (stages 1 and 2)."""
    buffers = []
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        params, offsets = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
        placed = [(names[p], tuple(p.shape), at) for p, at in zip(params, offsets, strict=True)]
        buffers.append(Buffer(flat, placed, zero.partition_size[i], zero.real_dp_process_group[i]))
    return _of(f"ZeRO-{2 if zero.partition_gradients else 1}", buffers)


def bf16_layout(bf16: Any, names: dict[torch.nn.Parameter, str]) -> Layout:
    """The layout of a ``BF16_Optimizer`` (what DeepSpeed makes of ZeRO-1 with bf16 weights and fp32 gradients)."""
    buffers = []
    for i, flat in enumerate(bf16.fp32_groups_flat_partition):
        placed, at = [], 0
        for p in bf16.bf16_groups[i]:
            placed.append((names[p], tuple(p.shape), at))
            at += p.numel()
        buffers.append(Buffer(flat, placed, flat.numel(), bf16.real_dp_process_group[i]))
    return _of("ZeRO-1 (bf16)", buffers)


def _of(name: str, buffers: list[Buffer]) -> Layout:
    made = Layout(name, [unit(buffer, k) for k, buffer in enumerate(buffers)], lists_all=False)
    made.known = {tuple(dist.get_process_group_ranks(buffer.group)): buffer.group for buffer in buffers}
    made.world_size = max(map(len, made.known), default=1)
    return made
