"""Slices of a dimension: FSDP2 and hybrid sharding (dim 0), tensor parallelism (either of a matrix's)."""

from __future__ import annotations

import math
import re

from ...config.param_groups import projects
from ...core.interval import Range
from .axes import cut_again
from .ranges import equal_ranges
from .shares import Arrangement, Named, Share, replicated

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


def split_dim(name: str, shape: tuple[int, ...], head: bool = False) -> int | None:
    """Along which dimension tensor parallelism splits a parameter, if it does: layers that project, with their biases.

    As :data:`_TAKES_COLUMNS` says by columns, else by rows.

    Args:
        head: the head is split, too, as AutoTP does.
    """
    takes = _TAKES_COLUMNS.search(name)
    if head and name.startswith("lm_head."):
        return 0
    if not projects(re.sub("bias$", "weight", name)):
        return None
    if takes:
        return 1 if len(shape) == 2 else None
    return 0


def tensor_parallel(named: Named, ranks: int) -> Arrangement:
    """What projects is split, see :func:`split_dim`; all else lies whole on every rank."""
    return cut_again(named, ranks, split_dim, replicated)
