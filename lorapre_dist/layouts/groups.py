"""Process groups of the ranks that share matrices: made all together, since making one is a collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from ..core.comm import all_ranks

Ranks = tuple[int, ...]


def over(wanted: Iterable[Ranks]) -> dict[Ranks, Any]:
    """A process group over each of these sets of ranks of the world; a collective over all ranks.

    Ranks may ask for different ones, in any order, or for none: every rank makes all that any asks for, in one order.
    (Making groups with ``use_local_synchronization`` instead deadlocks in gloo when a rank is in two groups.)
    """
    mine = set(wanted)
    made = {}
    for ranks in sorted({ranks for some in all_ranks(sorted(mine)) for ranks in some}):
        group = dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(list(ranks))
        if ranks in mine:
            made[ranks] = group
    return made
