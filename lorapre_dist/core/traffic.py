"""What the collectives of a step send, by purpose: the sequence of ``step.py`` on shapes alone, as ``comm.py`` counts.

A test holds it to what is counted, on every rank. Bytes are those of a ring: ``(n - 1) / n`` of what is gathered or
scattered over n ranks, twice that of a sum, all of what has one sender.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from . import batching
from .batching import Limits, Outline, evenly_dealt, owned
from .interval import Peers, Range, RowInterval, column_block, numel_of, row_blocks, row_teams
from .rules.muon import cuts
from .rules.needs import Needs
from .sizes import SAMPLES, packed_numel

#: Bytes of the numbers by which ranks agree on whether a step is taken (fp64).
FLAG = 8


@dataclass(frozen=True)
class Moved:
    """Bytes of a matrix that move to its owner and back where it is stepped whole.

    Attributes:
        there, back: of each element: of the gradient, and of the weight's change.
        row, column: of the state that lies with each row, and with each column.
        whole: of what every rank has of each column, which comes back alone.
        types: of numbers that go there there are so many, each of which is sent by itself.
    """

    there: int = 0
    back: int = 0
    row: int = 0
    column: int = 0
    whole: int = 0
    types: int = 1


@dataclass(frozen=True)
class Held:
    """A low-rank matrix as a rank holds it, without its numbers.

    Attributes:
        call: of the optimizer, in which it is stepped.
        moved: what moves of it where it is stepped whole.
    """

    outline: Outline
    interval: RowInterval
    peers: Peers | None
    call: int = 0
    moved: Moved = Moved()

    @property
    def cut(self) -> int:
        """Rows that are cut between the ranks that share it."""
        return len(self.peers.cut_rows(self.interval.shape)) if self.peers else 0


@dataclass(frozen=True)
class Collective:
    """Collectives of one purpose that go together.

    Attributes:
        bytes: that each rank sends.
        more: by place in the group, bytes that some ranks send beside, or less.
        each: of every rank beside, in their order; empty: nothing.
        calls: how many collectives they are.
    """

    purpose: str
    peers: Peers
    bytes: int
    more: Counter[int] = field(default_factory=Counter)
    each: tuple[int, ...] = ()
    calls: int = 1

    def at(self, index: int) -> int:
        """Bytes that the rank at a place of the group sends."""
        return self.bytes + self.more[index] + (self.each[index] if self.each else 0)


def collectives(
    matrices: Sequence[Held], needs: Needs, limits: Limits, stable: bool, kind: str
) -> Iterator[Collective]:
    """Those of a step on a rank's matrices, given in the order in which they are stepped.

    Args:
        stable: the variant, see :class:`lorapre_dist.core.regression.Regression`.
        kind: of device, ``"cpu"`` or ``"cuda"``.
    """
    for call in sorted({m.call for m in matrices}):
        some = [m for m in matrices if m.call == call]
        for wave in batching.plan([m.outline for m in some], limits):
            for bucket in wave:
                yield from _update(by_group([[some[k] for k in run] for run in bucket]), needs, limits, stable, kind)
            shared = by_group([[some[k] for k in run] for bucket in wave for run in bucket])
            yield from _dealt(shared, limits, "reduce Gram of B", "send inverse of B")
            if stable:
                yield from _dealt(shared, limits, "reduce Gram of A", "send gauge")


def by_group(runs: Iterable[Sequence[Held]]) -> list[list[Held]]:
    """Matrices that ranks share, by who they are."""
    groups: dict[int, list[Held]] = {}
    for run in runs:
        peers = run[0].peers
        if peers is not None:
            groups.setdefault(id(peers.group), []).extend(run)
    return list(groups.values())


def _update(groups: list[list[Held]], needs: Needs, limits: Limits, stable: bool, kind: str) -> Iterator[Collective]:
    """What a bucket sends to update theta and to reduce Z."""
    for shared in groups:
        yield from _gather_rows(shared)
        yield _gather(shared)
    if not stable:
        yield from _dealt(groups, limits, "reduce Gram of A", "send inverse of A")
    for shared in groups:
        yield from _sum_edges(shared, needs)
        yield from _reduce(shared)
    if needs.iterations:
        for shared in groups:
            yield from _orthogonalise(shared, needs.iterations, limits, kind)


def _blocks(shared: list[Held]) -> int:
    """Numbers of the blocks of ``A`` of all ranks, where they are not lent."""
    return sum(m.outline.block_size * m.outline.parts * sum(m.outline.ranks) for m in shared if not m.outline.lends)


def _gather(shared: list[Held]) -> Collective:
    """``A`` from its blocks, and how large gradients and factors are."""
    peers, one = _first(shared), shared[0].outline
    looks = len(shared) * (SAMPLES + len(one.ranks) + 1) * one.parts
    return Collective("gather A", peers, _ring((_blocks(shared) + looks) * one.itemsize, peers))


def _gather_rows(shared: list[Held]) -> Iterator[Collective]:
    """Rows of ``B`` and of the rows' statistics, to the ranks that hold other columns of them."""
    dealt = [m for m in shared if m.peers is not None and m.peers.deals_rows(m.outline.shape)]
    if not dealt:
        return
    each = [0] * len(_first(dealt).ranges)
    for m in dealt:
        peers, one = _first([m]), m.outline
        assert peers.columns is not None
        blocks = peers.row_blocks(one.shape)
        numbers = sum(one.ranks) + one.row_statistics
        for team in row_teams(peers.ranges, peers.columns, one.shape[1]).values():
            for k in team:
                low, high = blocks[k]
                each[k] += (len(team) - 1) * (high - low) * numbers * one.itemsize
    yield Collective("gather B", _first(dealt), 0, each=tuple(each))


def _sum_edges(shared: list[Held], needs: Needs) -> Iterator[Collective]:
    """Sums over rows that are cut between ranks, and over columns."""
    peers, one = _first(shared), shared[0].outline
    numbers = sum(m.cut for m in shared) * (needs.boundary_sums + sum(one.ranks))
    if needs.column_sums:
        numbers += sum(m.outline.shape[1] for m in shared)
    if numbers:
        yield Collective("edge rows", peers, _ring(numbers * one.itemsize, peers, 2))


def _reduce(shared: list[Held]) -> Iterator[Collective]:
    """Z to its blocks."""
    peers, numbers = _first(shared), _blocks(shared)
    if numbers:
        yield Collective("reduce Z", peers, _ring(numbers * shared[0].outline.itemsize, peers))


def _dealt(groups: list[list[Held]], limits: Limits, *names: str) -> Iterator[Collective]:
    """Grams to the ranks that solve them, and the answers to all (``dealing.py``)."""
    for shared in groups:
        peers, size = _first(shared), shared[0].outline.itemsize
        n, sides = len(peers.ranges), Counter(r for m in shared for r in m.outline.ranks)
        if evenly_dealt(list(sides.values()), n):
            lines = sum(-(-count // n) * n * r * r for r, count in sides.items())
            for name in names:
                yield Collective(name, peers, _ring(lines * size, peers))
            continue
        mine: Counter[int] = Counter()
        for r, count in sides.items():
            for index in range(n):
                low, high = owned(count, n, index)
                if low == high:
                    break
                mine[index] += (high - low) * r * r * size
        calls = sum(max(1, -(-some // limits.bucket)) for some in mine.values())
        yield Collective(names[0], peers, sum(mine.values()), _negative(mine), calls=calls)
        yield Collective(names[1], peers, 0, mine, calls=calls)


def _orthogonalise(shared: list[Held], iterations: tuple[int, ...], limits: Limits, kind: str) -> Iterator[Collective]:
    """What moves to make the updates of some matrices orthogonal (``rules/muon/orthogonal.py``)."""
    peers, size = _first(shared), shared[0].outline.itemsize
    plans = cuts.plan([(m.interval.shape, m.peers, size) for m in shared], iterations, limits.block)
    lines = []
    for m, plan in zip(shared, plans, strict=True):
        if plan.moved:
            lying, owner = _first([m]), plan.owner if plan.form == "whole" else 0
            lines.append(cuts.moving(m.interval.shape, lying.ranges, lying.columns, plan.form, owner))
    for back, name in enumerate(("move m", "return update")):
        if lines:
            each = tuple(size * sum(of) for of in zip(*(line[back] for line in lines), strict=True))
            yield Collective(name, peers, 0, each=each)
    rest = [(cuts.side(plan.form, m.interval.shape), plan) for m, plan in zip(shared, plans, strict=True)]
    rest = [(side, plan) for side, plan in rest if plan.form != "whole"]
    if not rest:
        return
    yield Collective("norm", peers, _ring(len(rest) * size, peers, 2))
    grams: Counter[int] = Counter()
    for side, plan in rest:
        grams[plan.owner] += packed_numel(side)
    half = 2 if kind != "cpu" and size == 4 else size  # they are iterated in fp16 on accelerators
    total = sum(grams.values()) * size
    to_owner = Counter({k: n * size for k, n in grams.items()})
    to_all = Counter({k: n * half for k, n in grams.items()})
    for _ in iterations:
        yield Collective("reduce Gram", peers, total, _negative(to_owner), calls=len(grams))
        yield Collective("broadcast polynomial", peers, 0, to_all, calls=len(grams))


def moving(guests: Sequence[tuple[Held, int]]) -> Iterator[Collective]:
    """What goes to the owners of some matrices, each given with its own, and comes back (``whole.py``)."""
    owner = {id(m): owner for m, owner in guests}
    for shared in by_group([[m] for m, _ in guests]):
        peers = _first(shared)
        there, returned = [0] * len(peers.ranges), [0] * len(peers.ranges)
        for m in shared:
            own, moved = owner[id(m)], m.moved
            for k, (elements, rows, columns) in enumerate(_parts(m.outline.shape, *_lying(m))):
                if k != own:
                    state = rows * moved.row + columns * moved.column
                    there[k] += elements * moved.there + state
                    returned[own] += elements * moved.back + state + moved.whole * m.outline.shape[1]
        for name, each in (("gather matrices", there), ("return matrices", returned)):
            yield Collective(name, peers, 0, each=tuple(each), calls=shared[0].moved.types)


def _lying(m: Held) -> tuple[tuple[Range, ...], tuple[Range, ...] | None]:
    peers = _first([m])
    return peers.ranges, peers.columns


@functools.lru_cache(maxsize=256)
def _parts(
    shape: tuple[int, int], ranges: tuple[Range, ...], columns: tuple[Range, ...] | None
) -> tuple[tuple[int, int, int], ...]:
    """Elements, rows and columns whose state lies there, of each rank."""
    q, n = shape[1], len(ranges)
    elements = [numel_of(*held, q, None if columns is None else columns[k]) for k, held in enumerate(ranges)]
    rows = [high - low for low, high in row_blocks(ranges, columns, q)]
    blocks = [column_block(q, n, k) for k in range(n)]
    return tuple(zip(elements, rows, (high - low for low, high in blocks), strict=True))


def agreeing(tensors: int, ranks: int) -> int:
    """Bytes that a rank sends to agree with others on whether a step is taken, and on who has which gradient."""
    return round((1 + tensors) * FLAG * (2 * (ranks - 1) / ranks))


def _first(shared: Iterable[Held]) -> Peers:
    peers = next(iter(shared)).peers
    assert peers is not None
    return peers


def _ring(size: int, peers: Peers, times: int = 1) -> int:
    """What a rank sends of so many bytes in a ring."""
    n = len(peers.ranges)
    return round(size * (times * (n - 1) / n))


def _negative(counts: Counter[int]) -> Counter[int]:
    return Counter({k: -n for k, n in counts.items()})
