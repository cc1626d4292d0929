"""The matrices of a layout, in an order that all ranks know; 3-D stacks of them (experts x p x q) are taken apart.

Expert ``e`` of a low-rank stack ``NAME`` becomes a matrix of its own, ``NAME[e]``. The ranks that hold a part of it are
few, and mostly one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch.distributed as dist

from ..core.comm import all_ranks
from ..core.interval import Peers
from .base import Layout, Piece
from .geometry.ranges import cut_into, expert_name, stack_parts
from .geometry.shares import Numbering, turn

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
    counted = Numbering(layout.lists_all, layout.numbered)
    for unit in layout.units:
        pieces = []
        for piece in unit.pieces:
            size, parts = 1, [(0, piece)]
            if piece.name in stacks:
                size, parts = piece.shape[0], list(_experts(piece, peers))
            ahead = counted.ahead(piece.shape, size)
            pieces += [replace(part, before=ahead(e)) for e, part in parts]
        unit.pieces = pieces
    layout.numbered = counted.so_far


def _experts(piece: Piece, peers: dict[tuple[str, int], Peers]) -> Iterator[tuple[int, Piece]]:
    """The matrices of a stack of which this rank holds a part."""
    inner = piece.shape[1] * piece.shape[2]
    for e, (start, stop) in cut_into(piece.start, piece.stop, inner):
        at = piece.offset + e * inner + start - piece.start
        shared = peers.get((piece.name, e))
        name, shape = expert_name(piece.name, e), piece.shape[1:]
        yield e, replace(piece, name=name, shape=shape, start=start, stop=stop, offset=at, peers=shared)


def _peers(stacks: dict[str, Piece]) -> dict[tuple[str, int], Peers]:
    """The holders of every matrix that this rank shares, by stack and index; a collective over all ranks.

    Every rank makes every group, in one order; those that hold nothing of a stack hear of it from the others.
    """
    mine = []
    for name, piece in stacks.items():
        if piece.peers is not None:
            ranks = tuple(dist.get_process_group_ranks(piece.peers.group))
            mine.append((name, piece.shape[1] * piece.shape[2], ranks, piece.peers.ranges))
    everyone = all_ranks(mine)
    made = {tuple(range(dist.get_world_size())): dist.group.WORLD}
    found = {}
    for name, inner, ranks, ranges in sorted({shared for part in everyone for shared in part}):
        for e, held in stack_parts(inner, ranks, ranges).items():
            members, intervals = tuple(held), tuple(held.values())
            if len(members) < 2:
                continue
            if members not in made:
                made[members] = dist.new_group(members)
            if dist.get_rank() in members:
                index, first = members.index(dist.get_rank()), ranks.index(members[0])
                found[name, e] = Peers(made[members], intervals, index, turn=turn(first, len(members), len(ranks)))
    return found
