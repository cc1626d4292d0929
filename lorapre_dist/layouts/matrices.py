"""The matrices of a layout, in an order that all ranks know; 3-D stacks of them (experts x p x q) are taken apart.

Expert ``e`` of a low-rank stack ``NAME`` becomes a matrix of its own, ``NAME[e]``. The ranks that hold a part of it are
few, and mostly one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..core.interval import Peers
from .base import Layout, Piece, Spread
from .geometry.ranges import cut_into, expert_name, matrix_parts, stack_boxes, stack_parts
from .geometry.shares import Numbering, turn

#: Of a parameter's name, its shape, and the index of its group.
LowRank = Callable[[str, tuple[int, ...], int], bool]


def arrange(layout: Layout, is_low_rank: LowRank) -> None:
    """Take the low-rank stacks apart and number the matrices, in place. Peers of their matrices are ranks, no groups.

    Of any other tensor that is spread there is but one group to find. Where a rank lists only what it holds a part of,
    those are numbered that the same ranks share.
    """
    counted, shared = Numbering(layout.numbered), defaultdict[Any, Numbering](Numbering)
    for unit in layout.units:
        pieces, over = [], None
        for piece in unit.pieces:
            size, parts = 1, [(0, piece)]
            if len(piece.shape) == 3 and is_low_rank(piece.name, piece.shape, unit.group):
                size, parts, over = piece.shape[0], list(_experts(piece)), unit.over
            ahead = counted.ahead(piece.shape, size)
            for e, part in parts:
                if not layout.lists_all:
                    ahead, e = shared[part.peers and part.peers.group].ahead(part.shape), 0
                pieces.append(replace(part, before=ahead(e)))
        unit.pieces, unit.over = pieces, over
    layout.numbered = counted.so_far


def _experts(piece: Piece) -> Iterator[tuple[int, Piece]]:
    """The matrices of a stack of which this rank holds a part."""
    if piece.spread is not None:
        yield from _boxed_experts(piece, piece.spread)
        return
    shape, inner = piece.shape[1:], math.prod(piece.shape[1:])
    shared = piece.peers
    held = {} if shared is None else stack_parts(inner, range(len(shared.ranges)), shared.ranges)
    for e, (start, stop) in cut_into(piece.start, piece.stop, inner):
        at = piece.offset + e * inner + start - piece.start
        peers = None if shared is None else _peers(shared, held[e])
        name = expert_name(piece.name, e)
        yield e, replace(piece, name=name, shape=shape, start=start, stop=stop, offset=at, peers=peers)


def _peers(of_stack: Peers, held: dict[int, tuple[int, int]]) -> Peers | None:
    """The ranks that hold a part of a matrix, ``held`` by each one's place among those of its stack."""
    if len(held) < 2 or of_stack.group is None:  # a plan of ranks has no groups
        return None
    members, first = tuple(of_stack.group[k] for k in held), next(iter(held))
    at = turn(first, len(held), len(of_stack.ranges))
    return Peers(members, tuple(held.values()), list(held).index(of_stack.index), turn=at)


def _boxed_experts(piece: Piece, spread: Spread) -> Iterator[tuple[int, Piece]]:
    """The same of a stack whose matrices are split as well: into rows, columns or both."""
    shape = piece.shape[1], piece.shape[2]
    low, high = spread.own[0]
    for e in range(low, high):
        held = stack_boxes(spread.boxes, e)
        if spread.index not in held:
            continue
        index, rows_and_columns = list(held).index(spread.index), matrix_parts(shape, list(held.values()))
        rows, columns = rows_and_columns
        at = turn(next(iter(held)), len(held), len(spread.ranks))
        ranks = tuple(spread.ranks[k] for k in held)
        peers = Peers(ranks, rows, index, columns, at) if len(held) > 1 else None
        own = None if columns is None else columns[index]
        offset = (e - low) * piece.numel // (high - low)
        name, parameter = expert_name(piece.name, e), None if own is None else piece.parameter
        yield e, Piece(name, shape, *rows[index], offset, peers, own, owned=piece.owned, parameter=parameter)
