"""A step by whole matrices (``work="matrices"``): each one that ranks share is stepped by one of them, its owner.

By rows every rank takes all of every ``A`` in and gives its part of every ``Z`` away: ``2 r q`` numbers a moment, of
each matrix, however many ranks there are. Its rows are ``p q / N`` numbers. So where a rank holds fewer rows than the
factors' ranks, it is less to bring gradient and state together on one rank, let that step the matrix as if it were its
own, and send back by what the weights change, and the state. Nothing but the step knows of it.

The owner steps weights that are 0 and do not decay: what they are then is the change. What comes back lies as what has
gone there, so each way is the other one's mirror image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import step
from .comm import Comm, unpack
from .exchange import Item, by_group
from .factors import Factors, Matrix, sampled_places
from .guard import bounds
from .interval import Peers, Range, RowInterval, column_block
from .owning import goes, rounds
from .rounding import Rounding
from .spec import Axis, axis_of
from .step import Rule
from .workspace import Workspace

#: For each rank, tensors in an order that both sides know.
Lists = list[list[Tensor]]
_Shape = tuple[tuple[int, ...], torch.dtype]


def by_matrices(items: list[Item], rule: Rule, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place, as :func:`.step.step` takes it; collective over their peers."""
    matrices = [item.matrix for item in items]
    element = [element_bytes(item.matrix, item.grad.element_size()) for item in items]
    for some in rounds(matrices, element, workspace, matrices[0].taken.device.type if items else "cpu"):
        guests = [_Guest(items[k], owner) for k, owner in some]
        own = _make_room(guests, workspace)
        _move(guests, comm, workspace)
        _begin(own)
        step.step(own, rule, comm, workspace)
        _move(guests, comm, workspace, back=True)
        _change(guests, rule.decay, workspace)
    step.step([item for item in items if not goes(item.matrix)], rule, comm, workspace)


def element_bytes(matrix: Matrix, itemsize: int) -> int:
    """Bytes of each element on its owner: of the gradient so many, and of the change."""
    return itemsize + matrix.dtype.itemsize


def _begin(items: Sequence[Item]) -> None:
    """Say how large each whole gradient is at most; let ``A`` lie as in one process, for products of the same bits."""
    for item, largest in zip(items, bounds([item.grad for item in items]) if items else (), strict=True):
        item.largest = largest
        item.theta.zero_()
        for factors in item.matrix.factors.values():
            factors.A = factors.A.contiguous()


def _change(guests: Sequence[_Guest], decay: Any, workspace: Workspace) -> None:
    """Weights by what has come back; those that are kept in fewer bits are widened part by part."""
    decays, plain = isinstance(decay, Tensor) or decay != 0, defaultdict[torch.dtype, list[_Guest]](list)
    for guest in guests:
        theta, change, go, rounding = guest.item.theta, guest.change, guest.item.go, guest.matrix.rounding
        guest.matrix.taken.add_(go.value)
        if theta.dtype == change.dtype:
            plain[theta.dtype].append(guest)
            continue
        size = workspace.block_on(theta.device.type) // change.element_size()
        for at in range(0, len(theta), size):
            part = theta[at : at + size]
            wide = rounding.wide(part, at, change.dtype)
            wide = wide.mul_(go.keep(1 - decay, change.dtype)) if decays else wide
            rounding.put(wide.add_(change[at : at + size]), part, at)
    for dtype, some in plain.items():
        weights = [guest.item.theta for guest in some]
        if decays:
            torch._foreach_mul_(weights, some[0].item.go.keep(1 - decay, dtype))
        torch._foreach_add_(weights, [guest.change for guest in some])


@dataclass
class _Guest:
    """A matrix on its way.

    Attributes:
        item: what this rank holds of it.
        whole: all of it, on its owner, with weights that are their change.
        change: this rank's piece of that (1-D).
    """

    item: Item
    owner: int
    whole: Item | None = field(init=False, default=None)
    change: Tensor = field(init=False)

    @property
    def matrix(self) -> Matrix:
        """As this rank holds it."""
        return self.item.matrix

    @property
    def peers(self) -> Peers:
        """The ranks that share it."""
        assert self.matrix.peers is not None
        return self.matrix.peers

    @property
    def is_mine(self) -> bool:
        """Whether this rank is its owner."""
        return self.peers.index == self.owner

    def here(self, back: bool) -> list[Tensor]:
        """What of it lies on this rank, in parts."""
        x, state = self._lying_here(back)
        found = [x] if self.peers.columns is None else self.matrix.transfer(self.owner).in_piece(x, self.owner)
        return [*found, *state]

    def types(self, back: bool) -> list[torch.dtype]:
        """Of what moves; also where nothing of it lies here."""
        x, state = self._lying_here(back)
        return [x.dtype, *(one.dtype for one in state)]

    def _lying_here(self, back: bool) -> tuple[Tensor, list[Tensor]]:
        return self.change if back else self.item.grad, [x for _, x in _state(self.matrix, back)]

    def there(self, back: bool) -> Lists:
        """The same of every rank, as parts of the whole."""
        assert self.whole is not None
        peers, shape = self.peers, self.matrix.interval.shape
        ranks, x = range(self.matrix.parts), self.whole.theta if back else self.whole.grad
        if peers.columns is None:
            found = [_cut(x, peers.ranges)]
        else:
            found = [[self.matrix.transfer(self.owner).in_target(x.view(shape), k) for k in ranks]]
        blocks = {Axis.ROWS: peers.row_blocks(shape), Axis.ALL_COLUMNS: [(0, shape[1]) for _ in ranks]}
        blocks[Axis.COLUMNS] = [column_block(shape[1], len(ranks), k) for k in ranks]
        found += [_cut(x, blocks[axis]) for axis, x in _state(self.whole.matrix, back)]
        return [[part for some in of_rank for part in some] for of_rank in zip(*found, strict=True)]


def _cut(x: Tensor, blocks: Sequence[Range]) -> list[list[Tensor]]:
    """What each rank has of a tensor, whose first dimension lies on the ranks in ``blocks``."""
    sizes = [high - low for low, high in blocks]
    if sum(sizes) > len(x):  # some rows are on several ranks
        return [[x[low:high]] for low, high in blocks]
    if x.ndim == 1 or not x.is_contiguous():
        return [[part] for part in x.split(sizes)]
    return [[part] for part in x.view(-1).split([size * x.shape[1] for size in sizes])]


def _state(matrix: Matrix, back: bool) -> list[tuple[Axis, Tensor]]:
    """The low-rank state, with A's columns as rows; what every rank has whole comes back alone."""
    found = []
    for factors in matrix.factors.values():
        found += [(Axis.ROWS, factors.B), (Axis.COLUMNS, factors.A.mT)]
    found += [(axis_of(key), x) for key, x in matrix.vectors.items()]
    return [(axis, x) for axis, x in found if back or axis is not Axis.ALL_COLUMNS]


# room ---------------------------------------------------------------------------------------------------------------


def _make_room(guests: Sequence[_Guest], workspace: Workspace) -> list[Item]:
    """Let each guest have room for its change, and on its owner for all of it, in buffers that are used again."""
    wanted: list[tuple[_Guest, str, list[_Shape]]]
    wanted = [(guest, "change", [((guest.item.theta.numel(),), guest.matrix.dtype)]) for guest in guests]
    wanted += [(guest, "whole", list(_shapes(guest.item))) for guest in guests if guest.is_mine]
    sizes: dict[tuple[str, torch.dtype], int] = defaultdict(int)
    for _, label, tensors in wanted:
        for shape, dtype in tensors:
            sizes[label, dtype] += prod(shape)
    like = guests[0].item.theta
    parts = {(label, dtype): _Parts(workspace, label, n, like, dtype) for (label, dtype), n in sizes.items()}
    for guest, label, tensors in wanted:
        room = iter([parts[label, dtype].take(shape) for shape, dtype in tensors])
        if label == "change":
            guest.change = next(room)
        else:
            guest.whole = _whole(guest.item, room)
    return [guest.whole for guest in guests if guest.whole is not None]


def _shapes(item: Item) -> Iterator[_Shape]:
    """Of all that :func:`_whole` is made of."""
    matrix, (p, q) = item.matrix, item.matrix.interval.shape
    yield (p * q,), matrix.dtype
    yield (p * q,), item.grad.dtype
    for axis, x in _state(matrix, back=False):
        yield (p if axis is Axis.ROWS else q, *x.shape[1:]), x.dtype


def _whole(item: Item, room: Iterator[Tensor]) -> Item:
    """All of a matrix, uninitialised; what every rank has of it is there."""
    matrix, (p, q) = item.matrix, item.matrix.interval.shape
    interval = RowInterval(matrix.interval.name, (p, q), 0, p * q)
    made = replace(item, theta=next(room), grad=next(room), look=None, size=None)
    made.matrix = replace(
        matrix,
        interval=interval,
        peers=None,
        factors={moment: Factors(next(room), next(room).mT) for moment in matrix.factors},
        vectors={k: x.clone() if axis_of(k) is Axis.ALL_COLUMNS else next(room) for k, x in matrix.vectors.items()},
        taken=matrix.taken.clone(),
        sampled=sampled_places(replace(interval, name=""), matrix.taken.device),
        rounding=Rounding(),
    )
    return made


class _Parts:
    """A buffer of the workspace, part by part."""

    def __init__(self, workspace: Workspace, label: str, size: int, like: Tensor, dtype: torch.dtype) -> None:
        self.buffer, self.at = workspace.take(label, (size,), like.new_empty(0, dtype=dtype)), 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """The next part."""
        begin = self.at
        self.at += torch.Size(shape).numel()
        return self.buffer[begin : self.at].view(*shape)


# moving -------------------------------------------------------------------------------------------------------------


def _move(guests: Sequence[_Guest], comm: Comm, workspace: Workspace, back: bool = False) -> None:
    """Bring matrices together on their owners, or ``back``: an all-to-all for each group and type of numbers."""
    purpose = "return matrices" if back else "gather matrices"
    exchanges = [one for group, some in by_group(guests) for one in _exchanges(group, some, back)]
    room = {}
    for dtype in {one.dtype for one in exchanges}:
        totals = [sum(sum(one.counts[side]) for one in exchanges if one.dtype == dtype) for side in (0, 1)]
        labelled = zip(("leaving", "arriving"), totals, strict=True)
        room[dtype] = [_Parts(workspace, *of, guests[0].item.theta, dtype) for of in labelled]
    waits = []
    for one in exchanges:
        sent, received = (parts.take((sum(n),)) for parts, n in zip(room[one.dtype], one.counts, strict=True))
        flat = [x if x.ndim == 1 else x.reshape(-1) for some in one.leaving for x in some]
        if flat:
            torch.cat(flat, out=sent)
        waits.append((comm.exchange(sent, received, one.counts, one.group, purpose), one.arriving))
    for wait, arriving in waits:
        unpack(wait(), [x for some in arriving for x in some])


@dataclass
class _Exchange:
    """What the ranks of a group send each other, of one type: by rank what leaves for it and what comes from it."""

    group: Any
    dtype: torch.dtype
    leaving: Lists
    arriving: Lists

    def __post_init__(self) -> None:
        self.counts = [[sum(x.numel() for x in some) for some in side] for side in (self.leaving, self.arriving)]


def _exchanges(group: Any, guests: Sequence[_Guest], back: bool) -> Iterator[_Exchange]:
    """Those of a group; what stays on this rank is copied."""
    peers = guests[0].peers
    here: Lists = [[] for _ in peers.ranges]
    there: Lists = [[] for _ in peers.ranges]
    types: dict[torch.dtype, None] = {}  # in an order that is the same on every rank
    for guest in guests:
        here[guest.owner] += guest.here(back)
        types |= dict.fromkeys(guest.types(back))
        if guest.is_mine:
            there = [[*so_far, *some] for so_far, some in zip(there, guest.there(back), strict=True)]
    own, mine = here[peers.index], there[peers.index]
    if own:
        mine = [x.view(to.shape) for x, to in zip(mine, own, strict=True)]
        torch._foreach_copy_(*((own, mine) if back else (mine, own)))
    here[peers.index], there[peers.index] = [], []
    for dtype in types:
        sides = [[[x for x in some if x.dtype == dtype] for some in side] for side in (here, there)]
        yield _Exchange(group, dtype, *(reversed(sides) if back else sides))
