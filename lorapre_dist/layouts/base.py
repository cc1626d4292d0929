"""What a layout tells the optimizer: for every tensor that it steps, which pieces of which parameters lie in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from ..core.interval import Peers, Range, numel_of
from .geometry.ranges import Box
from .geometry.shares import turn

#: Ranks of the world, in order: what stands for a process group until :func:`.groups.connect` finds or makes it.
Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Spread:
    """The ranks over which a tensor is spread, and the box of it that each of them holds."""

    ranks: Ranks
    boxes: tuple[Box, ...]
    index: int

    @property
    def own(self) -> Box:
        """The box of this rank."""
        return self.boxes[self.index]


@dataclass(frozen=True)
class Piece:
    """The elements ``[start, stop)``, in row-major order, of parameter ``name``, at ``offset`` in a stepped tensor.

    Attributes:
        shape: of the whole parameter.
        peers: the ranks that share the matrix (or stack of them), or None if this rank holds all of it.
        columns: of a matrix split by columns: those held here, of the whole rows from ``start`` to ``stop``.
        spread: of a tensor of three dimensions or more whose slices of dim 0 are split: how it lies. ``start`` and
            ``stop`` are those of the slices then.
        before: number of matrices, of their columns and of their elements ahead of this one in the layout, for one that
            is shared; the same on every rank that does.
        owned: whether this rank keeps state and takes the step; if not, others do, and under DDP send the result.
        replica: ranks beside the peers step the same, with gradients that are the same, and save it: of a weight that
            stages of a pipeline have tied, the first one's.
        parameter: the parameter itself, if it is split by columns, or in slices' parts.
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
    spread: Spread | None = None

    @property
    def runs(self) -> tuple[int, int, int, int] | None:
        """Where its elements lie in the parameter: from where, runs of how many, every how many; None: no such.

        And how many elements of the first run are not here.
        """
        if self.spread is not None:
            own, whole = self.spread.own, [(0, size) for size in self.shape]
            split = next(d for d in range(1, len(own)) if own[d] != whole[d] or d == len(own) - 1)
            inner = math.prod(self.shape[split + 1 :])
            (low, high), stride = own[split], inner * self.shape[split]
            alike = all(own[d] == whole[d] for d in range(1, len(own)) if d != split)
            between = math.prod(self.shape[1:split])
            start = own[0][0] * stride * between + low * inner
            return (start, max(1, (high - low) * inner), stride, 0) if alike else None
        if self.columns is not None:
            first, last = self.columns
            row, begin = divmod(self.start, self.shape[1])
            return row * self.shape[1] + first, max(1, last - first), self.shape[1], max(0, begin - first)
        return self.start, 1, 1, 0

    @property
    def split_inside(self) -> bool:
        """Whether its elements here are no run of the parameter's."""
        return self.columns is not None or self.spread is not None

    @property
    def numel(self) -> int:
        """Number of elements held here."""
        if self.spread is not None:
            return math.prod(high - low for low, high in self.spread.own)
        return numel_of(self.start, self.stop, self.shape[-1] if self.shape else 1, self.columns)


@dataclass(frozen=True)
class Send:
    """The elements ``[start, stop)`` of a tensor, which rank ``owner`` has stepped."""

    owner: int
    tensor: torch.Tensor
    start: int
    stop: int


@dataclass
class Unit:
    """One tensor that appears in ``param_groups``, its group's index, and the pieces in it.

    Attributes:
        over: the process group over which a stack of matrices is spread; the matrices have groups of their own.
    """

    tensor: torch.Tensor
    group: int
    pieces: list[Piece]
    over: Any = None
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
        spread_over: groups of ranks that hold different gradients of some parameters, all of which have to be finite.
        beyond: groups that lead, one after the other, to the ranks that have the model's other parameters, such as the
            other stages of a pipeline: a step is taken by all or none.
        joint: other ranks of the world bind their layouts at the same time; None: if it is spread over several.
        together: the process group whose ranks bind theirs at the same time, if those of the world do not.
        known: process groups that there are, by their ranks.
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
    joint: bool | None = None
    together: Any = None
    known: dict[Ranks, Any] = field(default_factory=dict)
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
        for ours, theirs in ((self.spread_over, added.spread_over), (self.beyond, added.beyond)):
            ours += [group for group in theirs if all(group is not g for g in ours)]
        self.world_size = max(self.world_size, added.world_size)
        self.numbered = added.numbered
        self.known |= added.known

    def groups(self) -> list[Any]:
        """All process groups that it knows."""
        peers = [piece.peers.group for unit in self.units for piece in unit.pieces if piece.peers is not None]
        over = [unit.over for unit in self.units]
        every = (self.group, self.together, *self.spread_over, *self.beyond, *peers, *over, *self.known.values())
        return [group for group in every if group is not None]

    @property
    def is_joint(self) -> bool:
        """Whether binding it is a collective over the world."""
        return dist.is_initialized() and (self.world_size > 1 if self.joint is None else self.joint)

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
    """The ranks of ``group`` that hold parts of a parameter: mostly few, and consecutive."""

    def __init__(self, group: Any) -> None:
        self.ranks = tuple(dist.get_process_group_ranks(group))
        self.rank = dist.get_rank(group)
        self.size = len(self.ranks)

    def peers(self, ranges: Sequence[Range]) -> Peers | None:
        """The holders of a parameter whose interval on rank k is ``ranges[k]``; None if this rank shares nothing.

        Their process group is made when the layout is bound.
        """
        holders = tuple(k for k, (start, stop) in enumerate(ranges) if start < stop)
        if len(holders) < 2 or self.rank not in holders:
            return None
        if len(holders) == self.size:
            return Peers(self.ranks, tuple(ranges), self.rank)
        held = tuple(ranges[k] for k in holders)
        at = turn(holders[0], len(holders), self.size)
        return Peers(tuple(self.ranks[k] for k in holders), held, holders.index(self.rank), turn=at)
