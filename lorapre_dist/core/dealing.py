"""The small solves, dealt out among the ranks that share matrices: no Gram is solved twice in a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batching import evenly_dealt, owned
from .comm import Comm
from .exchange import Work, by_group
from .interval import Peers

Solve = Callable[[Tensor], Tensor]
Names = tuple[str, str]


def deal_out(
    works: Sequence[Work], grams: list[list[Tensor]], solve: Solve, receive: Solve, comm: Comm, names: Names, limit: int
) -> list[list[Tensor]]:
    """Of each Gram (k x r x r; one for each moment of a work) what ``solve`` makes of its sum over the ranks.

    No Gram is solved twice in a group: it is summed on one rank, and what that makes of it is sent to all, which is as
    many bytes as an all-reduce of it. Ranks get equally many of each r.

    Args:
        solve: of n x r x r as many matrices.
        receive: done to these (n x r x r) on all ranks; what this makes of them (n x ...) is returned.
        names: purposes of the reduction and of the answers.
        limit: bytes of a collective that has one receiver or sender, at most.
    """
    found: dict[tuple[int, int], Tensor] = {}
    alone = [k for k, work in enumerate(works) if work.matrix.peers is None]
    index = {id(work): k for k, work in enumerate(works)}
    dealt: list[tuple[list[_Side], _Evenly | _OneByOne]] = []
    for _, shared in by_group(works):
        peers = shared[0].matrix.peers
        assert peers is not None
        sides = _by_side([index[id(work)] for work in shared], grams)
        batches = [batch for _, batch in sides]
        even = evenly_dealt([len(batch) for batch in batches], len(peers.ranges))
        dealt.append((sides, (_Evenly if even else _OneByOne)(batches, peers, comm, names, limit)))
    for places, batch in _by_side(alone, grams):
        _give_back(found, places, grams, receive(solve(batch)))
    for _, deal in dealt:
        for own in deal.own():
            own.copy_(solve(own))
        deal.send()
    for sides, deal in dealt:
        for (places, _), answer in zip(sides, deal.answers(), strict=True):
            _give_back(found, places, grams, receive(answer))
    return [[found[k, m] for m in range(len(some))] for k, some in enumerate(grams)]


#: Place and moment of some stacks, and all their Grams (n x r x r).
_Side = tuple[list[tuple[int, int]], Tensor]


def _by_side(places: Sequence[int], grams: list[list[Tensor]]) -> list[_Side]:
    """Grams of some works by their side."""
    sides: dict[int, list[tuple[int, int]]] = {}
    for k in places:
        for m, gram in enumerate(grams[k]):
            sides.setdefault(gram.shape[-1], []).append((k, m))
    return [(some, _joined([grams[k][m] for k, m in some])) for some in sides.values()]


def _give_back(
    found: dict[tuple[int, int], Tensor], places: list[tuple[int, int]], grams: list[list[Tensor]], every: Tensor
) -> None:
    sizes = [len(grams[k][m]) for k, m in places]
    found.update(zip(places, every.split(sizes), strict=True))


class _Evenly:
    """Equally many Grams to each rank: a reduce-scatter, and an all-gather of the answers."""

    def __init__(self, batches: list[Tensor], peers: Peers, comm: Comm, names: Names, limit: int) -> None:
        self.batches, self.peers, self.comm, self.name = batches, peers, comm, names[1]
        ranks, lines = len(peers.ranges), []
        for batch in batches:
            missing = -len(batch) % ranks
            padded = torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
            lines.append(padded.reshape(ranks, -1))
        self.sizes = [line.shape[1] for line in lines]
        self.reduced = comm.reduce_scatter(_joined(lines, 1), peers.group, names[0])

    def own(self) -> list[Tensor]:
        """What this rank solves, in place; waits for the sums."""
        self.mine = self.reduced()
        parts = zip(self.batches, self.mine.split(self.sizes), strict=True)
        bounds = [owned(len(batch), len(self.peers.ranges), self.peers.index) for batch in self.batches]
        found = [part.view(-1, *batch.shape[1:]) for batch, part in parts]
        return [part[: high - low] for part, (low, high) in zip(found, bounds, strict=True) if low < high]

    def send(self) -> None:
        """Start sending the answers."""
        self.gathered = self.comm.all_gather(self.mine, self.peers.group, self.name)

    def answers(self) -> list[Tensor]:
        """Of all ranks, in the order of the Grams."""
        parts = zip(self.batches, self.gathered().split(self.sizes, dim=1), strict=True)
        return [part.reshape(-1, *batch.shape[1:])[: len(batch)] for batch, part in parts]


class _OneByOne:
    """Too few Grams for all ranks: a reduction and a broadcast for each rank that solves some, in place."""

    def __init__(self, batches: list[Tensor], peers: Peers, comm: Comm, names: Names, limit: int) -> None:
        self.batches, self.peers, self.comm, self.name, self.limit = batches, peers, comm, names[1], limit
        self.parts = []
        for batch in batches:
            for owner in range(len(peers.ranges)):
                low, high = owned(len(batch), len(peers.ranges), owner)
                self.parts += [(owner, batch[low:high])] if low < high else []
        self.flat = [(owner, part.reshape(-1)) for owner, part in self.parts]
        self.reduced = comm.reduce(self.flat, peers.group, names[0], limit)

    def own(self) -> list[Tensor]:
        """What this rank solves, in place; waits for the sums."""
        self.reduced()
        return [part for owner, part in self.parts if owner == self.peers.index]

    def send(self) -> None:
        """Start sending the answers."""
        self.sent = self.comm.broadcast(self.flat, self.peers.group, self.name, self.limit)

    def answers(self) -> list[Tensor]:
        """Of all ranks, in the order of the Grams."""
        self.sent()
        return self.batches


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Behind each other; the tensor itself where there is one."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]
