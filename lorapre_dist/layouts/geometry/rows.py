"""Slices of a dimension: FSDP2 and hybrid sharding (dim 0), tensor parallelism (either of a matrix's)."""

from __future__ import annotations

import math
import re

from ...config.param_groups import projects
from ...core.interval import Range
from .ranges import equal_ranges
from .shares import Arrangement, Named, Share

#: Layers that take what others have split by columns, by the usual names: their weights are split by columns as well.
_TAKES_COLUMNS = re.compile(r"(^|\.)(o_proj|down_proj|out_proj|c_proj|fc2|wo|w2|dense_4h_to_h)\.")


def slices(shape: tuple[int, ...], ranks: int) -> tuple[Range, ...]:
    """Whole slices of dim 0 for each rank, as elements: as ``torch.chunk`` deals them out."""
    rows = shape[0] if shape else 1
    return equal_ranges(rows, ranks, math.prod(shape) // max(1, rows))


def fsdp2(named: Named, ranks: int) -> Arrangement:
    """``Shard(0)`` of every parameter."""
    shares = tuple(Share(name, shape, range(ranks), slices(shape, ranks)) for name, shape in named)
    held = [0] * ranks
    for share in shares:
        for k, (start, stop) in enumerate(share.ranges):
            if start == stop:
                break
            held[k] += stop - start
    return Arrangement(ranks, shares, tuple(held))


def tensor_parallel(named: Named, ranks: int) -> Arrangement:
    """Layers that project are split, with their biases: as :data:`_TAKES_COLUMNS` says by columns, else by rows.

    All else lies whole on every rank.
    """
    shares = []
    for name, shape in named:
        numel, takes = math.prod(shape), _TAKES_COLUMNS.search(name)
        split = ranks > 1 and projects(re.sub("bias$", "weight", name))
        if split and takes and len(shape) == 2:
            shares.append(Share(name, shape, range(ranks), ((0, numel),) * ranks, equal_ranges(shape[1], ranks)))
        elif split and not takes:
            shares.append(Share(name, shape, range(ranks), slices(shape, ranks)))
        else:
            shares.append(Share(name, shape, range(ranks), ((0, numel),)))
    return Arrangement(ranks, tuple(shares))
