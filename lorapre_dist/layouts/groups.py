"""Process groups over the ranks that share matrices: whichever they are, all made by one exchange.

``dist.new_group`` is a collective over the world, and all ranks have to make the same groups in the same order. (With
``use_local_synchronization`` its members alone would, but a group's name then depends on how many groups a rank has
made before, so that members of two groups look for each other under different names; and NCCL that is bound to devices
splits the world's communicator, which takes all ranks.) So when ranks bind their layouts, each says which groups it
lacks, and all make all of these, in one order. It does not matter how many matrices a rank has, in which order, nor
whether it shares one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ..core import ending
from ..core.comm import all_ranks
from .base import Layout, Piece, Ranks

_Wanted = tuple[Ranks, str | None, Any]


def connect(layout: Layout) -> None:
    """Give peers a process group where the layout knows their ranks alone.

    Groups of :attr:`Layout.known`, and the world, are used as they are. It is a collective over the world if the layout
    is joint, or lacks a group.
    """
    wanted = {piece.peers.group for unit in layout.units for piece in unit.pieces if piece.peers is not None}
    wanted |= {unit.over for unit in layout.units}
    lacking = {ranks for ranks in wanted if isinstance(ranks, tuple)} - layout.known.keys()
    if dist.is_initialized():
        ending.wait_at_exit()
        layout.known.setdefault(tuple(range(dist.get_world_size())), dist.group.WORLD)
        lacking -= layout.known.keys()
    if layout.is_joint or lacking:
        made = _made([(ranks, None, None) for ranks in lacking])
        layout.known.update({ranks: group for (ranks, _, _), group in made.items()})

    def of(group: Any) -> Any:
        return layout.known[group] if isinstance(group, tuple) else group

    for unit in layout.units:
        unit.over = of(unit.over)
        unit.pieces = [_with_group(piece, of) for piece in unit.pieces]


def twins(groups: Iterable[Any]) -> dict[int, Any]:
    """For each process group, by its id, another one over the same ranks, for what runs behind training.

    A collective over the world. They have the backend and time limit of the first.
    """
    mine = {id(group): _described(group) for group in groups}
    made = _made(mine.values())
    return {key: made[described] for key, described in mine.items()}


def _made(wanted: Iterable[_Wanted]) -> dict[_Wanted, Any]:
    """A process group for each that this rank is in of those that any wants: ranks, backend, time limit (or None)."""
    every, made = {one for part in all_ranks(list(set(wanted))) for one in part}, {}
    for ranks, backend, timeout in sorted(every, key=str):
        group = dist.new_group(list(ranks), backend=backend, timeout=timeout)
        if dist.get_rank() in ranks:
            made[ranks, backend, timeout] = group
    return made


def _with_group(piece: Piece, of: Any) -> Piece:
    if piece.peers is None or not isinstance(piece.peers.group, tuple):
        return piece
    return replace(piece, peers=replace(piece.peers, group=of(piece.peers.group)))


def _described(group: Any) -> _Wanted:
    """Ranks, backend and time limit of a process group."""
    timeout = None
    for kind in ("cuda", "cpu"):
        with contextlib.suppress(Exception):  # of backends without options, or without this device
            timeout = group._get_backend(torch.device(kind)).options._timeout
            break
    return tuple(dist.get_process_group_ranks(group)), dist.get_backend_config(group), timeout
