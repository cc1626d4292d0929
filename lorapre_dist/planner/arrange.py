"""Where a request's parameters lie: which geometry it asks for."""

from __future__ import annotations

import functools

from lorapre_dist.layouts.geometry import dealt, flat, per_parameter, rows, shares
from lorapre_dist.layouts.geometry.shares import Arrangement

from .request import Request


@functools.lru_cache(maxsize=8)
def arranged(request: Request) -> Arrangement:
    """The parameters over the ranks that share them."""
    named, n, zero = [(p.name, p.shape) for p in request.parameters], request.sharing, request.zero
    match request.layout:
        case "zero1" | "zero2":
            align = 16 // request.width if zero.parameter_alignment else 1
            found = flat.zero12(named, n, align, zero.round_robin_gradients)
        case "zero3":
            found = per_parameter.zero3(named, n, zero.sub_group_size)
        case "fsdp1" if n > 1:
            units = [[(p.name, p.shape) for p in unit] for unit in request.wrapped().values()]
            found = flat.fsdp1(units, named, n)
        case "fsdp2" | "hsdp":
            found = rows.fsdp2(named, n)
        case "tp":
            found = rows.tensor_parallel(named, n)
        case "ddp" if request.shard_state:
            found = dealt.ddp(named, n, lambda name, shape: request.kept_as(name, shape) is not None)
        case _:
            found = shares.replicated(named)
    return found.matrices(lambda name, shape: request.kept_as(name, shape) is not None)
