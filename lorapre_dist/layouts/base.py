"""What a layout tells the optimizer: for every tensor that it steps, which pieces of which parameters lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from ..core.comm import all_ranks
from ..core.interval import Peers, Range
from .geometry.shares import turn


@dataclass(frozen=True)
class Piece:
    """The elements ``[start, stop)``, in row-major order, of parameter ``name``, at ``offset`` in a stepped tensor.

    Attributes:
        shape: of the whole parameter.
        peers: the ranks that share the matrix (or stack of them), or None if this rank holds all of it.
        columns: of a matrix split by columns: those held here, of the whole rows from ``start`` to ``stop``.
        before: number of matrices, of their columns and of their elements ahead of this one in the layout, for one that
            is shared; the same on every rank that does.
        owned: whether this rank keeps state and takes the step; if not, others do, and under DDP send the result.
        replica: ranks beside the peers step the same, with gradients that are the same, and save it: of a weight that
            stages of a pipeline have tied, the first one's.
        parameter: the parameter itself, if it is split by columns.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int
    peers: Peers | None = None
    columns: Range | None = None
    owned: bool = True
    replica: bool = False
    before: tuple[int, int, int] = (0, 0, 0)
    parameter: Any = field(default=None, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Number of elements held here."""
        if self.columns is None:
            return self.stop - self.start
        return (self.stop - self.start) // self.shape[1] * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class Send:
    """The elements ``[start, stop)`` of a tensor, which rank ``owner`` has stepped."""

    owner: int
    tensor: torch.Tensor
    start: int
    stop: int


@dataclass
class Unit:
    """One tensor that appears in ``param_groups``, its group's index, and the pieces in it."""

    tensor: torch.Tensor
    group: int
    pieces: list[Piece]
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.tensor.device


@dataclass
class Layout:
    """The units of this rank.

    Attributes:
        name: for reports, e.g. ``"ZeRO-3"``.
        units: in the order in which they are stepped; the same on every rank.
        world_size: ranks over which the optimizer state is spread (1: every rank has all of it).
        sends: what ranks of ``group`` send to all others after a step, in an order that is the same on every rank.
        native: found out by the optimizer itself, not told by an engine.
        spread_over: groups of ranks with other gradients of the same parameters, all of which have to be finite.
        beyond: groups that lead, one after the other, to the ranks that have the model's other parameters, such as the
            other stages of a pipeline: a step is taken by all or none.
        checks_gradients: an engine steps with finite gradients only, on all ranks alike.
        lists_all: its units have every parameter, also those of which this rank holds nothing.
        numbered: matrices so far, their columns and their elements (:attr:`Piece.before` of the next one).
    """

    name: str
    units: list[Unit] = field(default_factory=list)
    world_size: int = 1
    sends: list[Send] = field(default_factory=list)
    group: Any = None
    native: bool = False
    spread_over: list[Any] = field(default_factory=list)
    beyond: list[Any] = field(default_factory=list)
    checks_gradients: bool = False
    lists_all: bool = True
    numbered: tuple[int, int, int] = (0, 0, 0)

    def extend(self, added: Layout) -> None:
        """Take the units of ``added`` in, behind those that are there.

        Raises:
            ConfigError: they lie otherwise.
        """
        if added.name != self.name:
            raise ConfigError(
                f"parameters that came later lie under {added.name}, those before under {self.name}: wrap the whole "
                "model before the optimizer steps or loads its state"
            )
        self.units += added.units
        self.sends += added.sends
        self.spread_over += [group for group in added.spread_over if all(group is not g for g in self.spread_over)]
        self.world_size = max(self.world_size, added.world_size)
        self.numbered = added.numbered

    def groups(self) -> list[Any]:
        """All process groups that it knows."""
        peers = [piece.peers.group for unit in self.units for piece in unit.pieces if piece.peers is not None]
        return [group for group in (self.group, *self.spread_over, *self.beyond, *peers) if group is not None]

    def replaced(self, groups: list[dict[str, Any]]) -> bool:
        """Whether a tensor of it is in none of an optimizer's groups any more, or on another device."""
        if not self.native:
            return False
        present = {id(p) for group in groups for p in group["params"]}
        return any(id(u.tensor) not in present or u.tensor.device != u.device for u in self.units)


def local_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of what :func:`local` gives; a collective if the gradient lies otherwise than the tensor."""
    grad: Any = tensor.grad
    if isinstance(tensor, DTensor) and isinstance(grad, DTensor):
        if grad.placements != tensor.placements:
            grad = grad.redistribute(placements=tensor.placements)
        return grad.to_local()
    return grad


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: a DTensor's local part, another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class SubGroups:
    """Process groups over runs of consecutive ranks of ``group``, each made once.

    Args:
        replicas: the world may consist of several groups of one size that hold the same, as in hybrid sharding.

    Raises:
        ConfigError: ``group`` is not the whole world, nor one of such groups.
    """

    def __init__(self, group: Any, replicas: bool = False) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._made: dict[tuple[int, ...], Any] = {}
        self.replicas = [dist.get_process_group_ranks(group)]
        if replicas and self.size != dist.get_world_size():
            self.replicas = [list(ranks) for ranks in sorted({tuple(ranks) for ranks in all_ranks(self.replicas[0])})]
        if {len(ranks) for ranks in self.replicas} != {self.size} or (
            sorted(rank for ranks in self.replicas for rank in ranks) != list(range(dist.get_world_size()))
        ):
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
            for ranks in self.replicas:  # every rank makes all of them, and keeps its own
                made = dist.new_group([ranks[k] for k in holders])
                if dist.get_rank() in ranks:
                    self._made[holders] = made
        if self.rank not in holders:
            return None
        held = tuple(ranges[k] for k in holders)
        at = turn(holders[0], len(holders), self.size)
        return Peers(self._made[holders], held, holders.index(self.rank), turn=at)
