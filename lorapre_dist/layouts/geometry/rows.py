"""Slices of a dimension: FSDP2 and hybrid sharding (dim 0), tensor parallelism (either of a matrix's)."""

from __future__ import annotations

import math
import re

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
    """Projections of numbered blocks: ``Shard(1)`` where they take what is split (:data:`_TAKES_COLUMNS`), else
    ``Shard(0)``, with their biases. All else lies whole on every rank.
    """
    shares = []
    for name, shape in named:
        numel, split = math.prod(shape), ranks > 1 and re.search(r"\.\d+\..*proj|\.\d+\..*\.(w[123]|fc[12])", name)
        if split and _TAKES_COLUMNS.search(name) and len(shape) == 2:
            shares.append(Share(name, shape, range(ranks), ((0, numel),) * ranks, equal_ranges(shape[1], ranks)))
        elif split and not _TAKES_COLUMNS.search(name):
            shares.append(Share(name, shape, range(ranks), slices(shape, ranks)))
        else:
            shares.append(Share(name, shape, range(ranks), ((0, numel),)))
    return Arrangement(ranks, tuple(shares))
