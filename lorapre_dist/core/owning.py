"""Who owns each matrix in a step by whole matrices (``whole.py``), and which go together: from shapes, without torch.

A matrix's owner is the rank that has least to do when its turn comes, the largest first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from .batching import Outline
from .interval import Peers, RowInterval
from .sizes import Sizes
from .traffic import Held


class Lies(Protocol):
    """A matrix as a rank holds it."""

    @property
    def outline(self) -> Outline:
        """What decides how it goes through a step."""

    @property
    def interval(self) -> RowInterval:
        """The rank's piece."""

    @property
    def peers(self) -> Peers | None:
        """The ranks that share it."""


#: Places of matrices that go together, and the place of each one's owner among the ranks that share it.
Round = list[tuple[int, int]]


def goes(matrix: Lies) -> bool:
    """Whether a matrix is one that an owner steps: it has factors, and is shared."""
    return matrix.peers is not None and any(matrix.outline.ranks)


def rounds(matrices: Sequence[Lies], element: Sequence[int], sizes: Sizes, kind: str) -> list[Round]:
    """Of all that go, in the order of a step, and the same on all ranks that share them.

    In a round no owner gets more than a bucket of what the same ranks share, unless it is one matrix that is larger.
    What others share goes in the same rounds, or ranks that wait for each other there would wait in a chain.

    Args:
        element: bytes of gradient and change for each element of a matrix.
        kind: of device.
    """
    groups: dict[int, list[int]] = {}
    for k, one in enumerate(matrices):
        if one.peers is not None and goes(one):
            groups.setdefault(id(one.peers.group), []).append(k)
    found: list[Round] = []
    limit = min(sizes.bucket_on(kind), Sizes().bucket_on(kind))
    for places in groups.values():
        outlines = [matrices[k].outline for k in places]
        costs = tuple((flops(one), _bytes(one, element[k])) for k, one in zip(places, outlines, strict=True))
        some = _rounds(costs, outlines[0].parts, outlines[0].before[0], limit)
        found += [[] for _ in range(len(some) - len(found))]
        for together, of_group in zip(found, some, strict=False):
            together += [(places[k], owner) for k, owner in of_group]
    return found


@functools.lru_cache(maxsize=64)
def _rounds(costs: tuple[tuple[int, int], ...], ranks: int, first: int, limit: int) -> list[Round]:
    found: list[Round] = []
    last: dict[int, tuple[int, int]] = {}  # by owner: its last round, and what it gets there
    for k, owner in enumerate(owners([one for one, _ in costs], ranks, first)):
        at, so_far = last.get(owner, (0, 0))
        if so_far and so_far + costs[k][1] > limit:
            at, so_far = at + 1, 0
        last[owner] = at, so_far + costs[k][1]
        found += [[] for _ in range(at + 1 - len(found))]
        found[at].append((k, owner))
    return found


def owners(work: Sequence[int], ranks: int, first: int = 0) -> list[int]:
    """Of matrices that take so much work: largest first, to the one of the ranks with least to do so far.

    Args:
        first: the rank to begin with: what is stepped in several calls of the optimizer begins elsewhere.
    """
    load, owner = [0] * ranks, [0] * len(work)
    order = [(first + k) % ranks for k in range(ranks)]
    for k in sorted(range(len(work)), key=lambda k: -work[k]):
        owner[k] = min(order, key=load.__getitem__)
        load[owner[k]] += work[k]
    return owner


def flops(one: Outline) -> int:
    """Of a step: three products of p x q, the Grams and changes of both factors, a Cholesky factor and an inverse."""
    p, q = one.shape
    return sum(6 * p * q * r + 6 * (p + q) * r * r + 2 * r**3 for r in one.ranks)


def _bytes(one: Outline, element: int) -> int:
    p, q = one.shape
    return p * q * element + one.bytes(p + q, 0)


def whole(one: Lies, call: int = 0) -> Held:
    """A matrix as it lies on its owner; for ``call`` see :class:`.traffic.Held`."""
    (p, q), outline, peers = one.interval.shape, one.outline, one.peers
    assert peers is not None
    low, high = peers.row_blocks((p, q))[peers.index]
    shape, _, *kind = outline.alike
    made = replace(
        outline,
        rows=p,
        statistics=outline.statistics + outline.row_statistics * (p - (high - low)),
        parts=1,
        lends=True,
        largest=p * q * outline.itemsize,
        alike=(shape, None, *kind),
        turn=0,
        gathered=0,
    )
    return Held(made, RowInterval(one.interval.name, (p, q), 0, p * q), None, call)


def workspace_bytes(
    matrices: Sequence[Lies],
    element: Sequence[int],
    sizes: Sizes,
    kind: str,
    of_step: Callable[[Sequence[Lies]], int],
) -> int:
    """Bound on what a step by matrices allocates: what is on its way, and the steps of a rank's own ones.

    Args:
        element: see :func:`rounds`.
        of_step: what a step by rows allocates.
    """
    steps = [of_step([one for one in matrices if not goes(one)])]
    for some in rounds(matrices, element, sizes, kind):
        steps.append(of_step([whole(matrices[k]) for k, owner in some if owner == _place(matrices[k])]))
    return max(steps) + buffer_bytes(matrices, element, sizes, kind)


def buffer_bytes(matrices: Sequence[Lies], element: Sequence[int], sizes: Sizes, kind: str) -> int:
    """Bytes of the buffers that are used again: of whole matrices, of what leaves and arrives, and of changes here."""
    most = (0, 0, 0)
    for some in rounds(matrices, element, sizes, kind):
        size = {k: _bytes(matrices[k].outline, element[k]) for k, _ in some}
        own = sum(size[k] for k, owner in some if owner == _place(matrices[k]))
        parts = sum(-(-size[k] // matrices[k].outline.parts) for k, _ in some)
        here = sum(matrices[k].interval.numel * matrices[k].outline.itemsize for k, _ in some)
        most = max(most[0], own), max(most[1], own, parts), max(most[2], here)
    return most[0] + 2 * most[1] + most[2]


def _place(one: Lies) -> int:
    assert one.peers is not None
    return one.peers.index
