"""Tensor parallelism of engines that give a rank its part of a matrix as a tensor of its own, and may cut that again.

A layout of such parts, be they whole, cut from a flat buffer or flattened one by one, becomes one of whole parameters:
a part of rows is an interval, a part of columns an interval within these columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ..config import ConfigError
from ..core.comm import all_ranks
from ..core.interval import Peers, Range
from .base import Layout, Piece
from .geometry.axes import Split


def splits(parts: Mapping[str, tuple[tuple[int, ...], int]], group: Any) -> dict[str, Split]:
    """Where the parts of this rank lie, by parameter; a collective over ``group``, the tensor-parallel ranks.

    Args:
        parts: shape of this rank's part, and the dimension that is split.

    Raises:
        ConfigError: on all ranks, if parts do not make up a matrix or a vector.
    """
    index, every = dist.get_rank(group), all_ranks(dict(parts), group)
    found = {}
    for name, (shape, dim) in parts.items():
        there = [theirs.get(name) for theirs in every]
        same = all(one is not None and one[1] == dim and _beside(one[0], dim) == _beside(shape, dim) for one in there)
        if not same or not 0 <= dim < len(shape) <= 2:
            raise ConfigError(
                f"{name}: tensor-parallel ranks hold {[one and one[0] for one in there]} of it, split along {dim}: "
                "LoRAPre supports matrices split by rows or columns"
            )
        sizes = [one[0][dim] for one in there if one is not None]
        whole = tuple(sum(sizes) if d == dim else n for d, n in enumerate(shape))
        found[name] = Split(whole, dim, sum(sizes[:index]), sum(sizes[: index + 1]))
    return found


def _beside(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def join(layout: Layout, found: Mapping[str, Split], ranks: Sequence[int], first: bool) -> None:
    """Make ``layout`` one of whole parameters, in place; a collective over all ranks.

    Args:
        ranks: of the world, those that together hold one copy of the model's (or a stage's) parameters.
        first: whether this is the tensor-parallel rank that saves what is the same on all of them.
    """
    for unit in layout.units:
        unit.pieces = [
            of_whole(piece, found[piece.name]) if piece.name in found else replace(piece, replica=not first)
            for piece in unit.pieces
        ]
    split = {piece.name: piece for unit in layout.units for piece in unit.pieces if piece.name in found}
    everyone = all_ranks({name: (piece.start, piece.stop, piece.columns) for name, piece in split.items()})
    for unit in layout.units:
        unit.pieces = [_shared(piece, everyone, ranks) if piece.name in split else piece for piece in unit.pieces]
    layout.world_size, layout.joint = max(layout.world_size, len(ranks)), True


def of_whole(part: Piece, split: Split) -> Piece:
    """A piece of a part as one of the whole parameter."""
    (start, stop), columns = split.of_whole(part.start, part.stop)
    return replace(part, shape=split.shape, start=start, stop=stop, columns=columns, peers=None)


def _shared(piece: Piece, everyone: list[dict[str, tuple[int, int, Range | None]]], ranks: Sequence[int]) -> Piece:
    """The piece with the ranks that share its matrix."""
    holders = [rank for rank in ranks if piece.name in everyone[rank]]
    if len(piece.shape) != 2 or len(holders) < 2:
        return piece
    held = [everyone[rank][piece.name] for rank in holders]
    columns = tuple(some or (0, 0) for _, _, some in held) if piece.columns is not None else None
    ranges = tuple((start, stop) for start, stop, _ in held)
    return replace(piece, peers=Peers(tuple(holders), ranges, holders.index(dist.get_rank()), columns))
