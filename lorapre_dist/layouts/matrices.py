"""The matrices of a layout, in an order that all ranks know; 3-D stacks of them (experts x p x q) are taken apart.

Expert ``e`` of a low-rank stack ``NAME`` becomes a matrix of its own, ``NAME[e]``. The ranks that hold a part of it are
few, and mostly one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ..core.factors import Peers
from ..core.interval import Range
from .base import Layout, Piece
from .ranges import expert_name

#: Of a parameter's name, its shape, and the index of its group.
LowRank = Callable[[str, tuple[int, ...], int], bool]


def arrange(layout: Layout, is_low_rank: LowRank) -> None:
    """Take the low-rank stacks apart and number the matrices, in place; a collective if the layout is sharded."""
    stacks = {
        piece.name: piece
        for unit in layout.units
        for piece in unit.pieces
        if len(piece.shape) == 3 and is_low_rank(piece.name, piece.shape, unit.group)
    }
    peers = _peers(stacks) if layout.world_size > 1 and dist.is_initialized() else {}  # a plan of ranks has no group
    count, columns, elements = layout.numbered
    for unit in layout.units:
        pieces = []
        for piece in unit.pieces:
            size, q = 1, piece.shape[-1] if len(piece.shape) > 1 else 0
            parts = [(0, piece)]
            if piece.name in stacks:
                size, parts = piece.shape[0], list(_experts(piece, peers))
            numel = math.prod(piece.shape) // max(1, size) if q else 0
            for e, part in parts:
                # Neighbours share one matrix of a flat buffer, and each counts from its own first one.
                ahead = (count + e, columns + e * q, elements + e * numel) if layout.lists_all else (0, 0, 0)
                pieces.append(replace(part, before=ahead))
            count, columns, elements = count + size, columns + size * q, elements + size * numel
        unit.pieces = pieces
    layout.numbered = count, columns, elements


def _experts(piece: Piece, peers: dict[tuple[str, int], Peers]) -> Iterator[tuple[int, Piece]]:
    """The matrices of a stack of which this rank holds a part."""
    inner = piece.shape[1] * piece.shape[2]
    for e, start, stop in _cut(piece.start, piece.stop, inner):
        at = piece.offset + e * inner + start - piece.start
        shared = peers.get((piece.name, e))
        yield e, Piece(expert_name(piece.name, e), piece.shape[1:], start, stop, at, shared, owned=piece.owned)


def _cut(start: int, stop: int, inner: int) -> Iterator[tuple[int, int, int]]:
    """``[start, stop)`` by runs of ``inner`` elements: index of the run, start and stop in it."""
    for e in range(start // inner, -(-stop // inner) if start < stop else 0):
        yield e, max(start - e * inner, 0), min(stop - e * inner, inner)


def _peers(stacks: dict[str, Piece]) -> dict[tuple[str, int], Peers]:
    """The holders of every matrix that this rank shares, by stack and index; a collective over all ranks.

    Every rank makes every group, in one order; those that hold nothing of a stack hear of it from the others.
    """
    mine = []
    for name, piece in stacks.items():
        if piece.peers is not None:
            ranks = tuple(dist.get_process_group_ranks(piece.peers.group))
            mine.append((name, piece.shape[1] * piece.shape[2], ranks, piece.peers.ranges))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    made = {tuple(range(dist.get_world_size())): dist.group.WORLD}
    found = {}
    for name, inner, ranks, ranges in sorted({shared for part in everyone for shared in part}):
        holders: dict[int, list[tuple[int, Range]]] = {}
        for rank, (start, stop) in zip(ranks, ranges, strict=True):
            for e, *part in _cut(start, stop, inner):
                holders.setdefault(e, []).append((rank, (part[0], part[1])))
        for e in sorted(e for e, parts in holders.items() if len(parts) > 1):
            members, intervals = zip(*holders[e], strict=True)
            if members not in made:
                made[members] = dist.new_group(members)
            if dist.get_rank() in members:
                turn = ranks.index(members[0]) % 2 if len(members) < len(ranks) else 0
                found[name, e] = Peers(made[members], intervals, members.index(dist.get_rank()), turn=turn)
    return found
