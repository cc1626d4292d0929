"""Every parameter flattened and cut into equal padded parts: DeepSpeed's ZeRO-3."""

from __future__ import annotations

import math

from .ranges import equal_ranges
from .shares import Arrangement, Named, Share


def zero3(named: Named, ranks: int, sub_group_size: int) -> Arrangement:
    """Parts packed by sub-groups, each of which is a call of the optimizer (``stage3.py``).

    Args:
        sub_group_size: elements of a rank's parts after which a sub-group is full.
    """
    calls, shares = [0], []
    for name, shape in named:
        numel = math.prod(shape)
        if calls[-1] >= sub_group_size:
            calls.append(0)
        calls[-1] += -(-numel // ranks)
        shares.append(Share(name, shape, range(ranks), equal_ranges(numel, ranks), call=len(calls)))
    return Arrangement(ranks, tuple(shares), (sum(calls),) * ranks, max(calls))
