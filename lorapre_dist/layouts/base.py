"""What a layout tells the optimizer: for every tensor that it steps, which pieces of which parameters lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..config import ConfigError
from ..core.factors import Peers
from ..core.interval import Range


@dataclass(frozen=True)
class Piece:
    """The elements ``[start, stop)``, in row-major order, of parameter ``name``, at ``offset`` in a stepped tensor.

    Attributes:
        shape: of the whole parameter.
        peers: the ranks that share the parameter, or None if this rank holds all of it (or it is no matrix).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    peers: Peers | None = None


@dataclass
class Unit:
    """One tensor that appears in ``param_groups``, its group's index, and the pieces in it."""

    tensor: torch.Tensor
    group: int
    pieces: list[Piece]


@dataclass
class Layout:
    """The units of this rank.

    Attributes:
        name: for reports, e.g. ``"ZeRO-3"``.
        units: in the order in which they are stepped; the same on every rank.
        world_size: ranks over which the optimizer state is spread (1: every rank has all of it).
    """

    name: str
    units: list[Unit] = field(default_factory=list)
    world_size: int = 1


class SubGroups:
    """Process groups over runs of consecutive ranks of ``group``, each made once.

    Raises:
        ConfigError: ``group`` is not the whole world, whose ranks have to make process groups together.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._made: dict[tuple[int, ...], Any] = {}
        if self.size != dist.get_world_size():
            raise ConfigError(
                f"parameters are partitioned over {self.size} of {dist.get_world_size()} ranks: "
                "LoRAPre supports plain data parallelism over all ranks"
            )

    def peers(self, ranges: Sequence[Range]) -> Peers | None:
        """The holders of a parameter whose interval on rank k is ``ranges[k]``; None if this rank shares nothing.

        Collective: every rank has to ask for the same parameters in the same order. (Making groups with
        ``use_local_synchronization`` instead deadlocks in gloo when a rank is in two groups.)
        """
        holders = tuple(k for k, (start, stop) in enumerate(ranges) if start < stop)
        if len(holders) < 2:
            return None
        if len(holders) == self.size:
            return Peers(self.group, tuple(ranges), self.rank)
        if holders not in self._made:
            self._made[holders] = dist.new_group([dist.get_global_rank(self.group, k) for k in holders])
        if self.rank not in holders:
            return None
        return Peers(self._made[holders], tuple(ranges[k] for k in holders), holders.index(self.rank))
