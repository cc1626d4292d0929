"""Numbers that a step goes by, and its plan too, which is made where torch takes too long to import."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

#: Elements of a matrix's gradient that are looked at to tell its size.
SAMPLES = 64
#: Elements of the Grams that are solved at a time on a CPU.
CHUNK = 1 << 16
#: An accelerator takes blocks so many times as large: there it is not a cache that counts but the number of launches.
ACCELERATOR = 16
#: Bytes of one row block's p x q temporary on a CPU, and of what is in flight between ranks at a time.
BLOCK, BUCKET = 1 << 20, 32 << 20
#: Matrices of a kind are stacked if so many of them fit in a block: larger ones do not make up for their being copied.
FEWEST = 8


def runs(kinds: Sequence[Hashable], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """For each stack the places of its matrices: of one kind, as many as have ``limit`` bytes of weights together.

    Args:
        kinds: of each matrix; None for one that stays alone.
        sizes: bytes of each matrix's weights, the same within a kind.
    """
    equal: dict[Hashable, list[int]] = defaultdict(list)
    for k, kind in enumerate(kinds):
        if kind is not None:
            equal[kind].append(k)
    found = []
    for places in equal.values():
        size = limit // sizes[places[0]]
        if size >= FEWEST:
            found += [places[k : k + size] for k in range(0, len(places), size)]
    return [run for run in found if len(run) > 1]
