"""Where a request's parameters lie: which geometry it asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lorapre_dist.layouts.geometry import axes, dealt, flat, per_parameter, rows, shares
from lorapre_dist.layouts.geometry.shares import Arrangement, IsLowRank, Named

from .request import Request


@functools.lru_cache(maxsize=64)
def arranged(request: Request) -> Arrangement:
    """The parameters of a model, or of one stage of it, over the ranks that share them."""
    named = [(p.name, p.shape) for p in request.parameters]

    def kept(name: str, shape: tuple[int, ...]) -> bool:
        return request.kept_as(name, shape) is not None

    return axes.cut_again(named, request.tensor, request.split_dim, _inner(request, kept)).matrices(kept)


def _inner(request: Request, kept: IsLowRank) -> Callable[[Named], Arrangement]:
    """How parameters are spread over data-parallel ranks."""
    n, zero = request.sharing // request.tensor, request.zero
    match request.layout:
        case "zero1" | "zero2":
            align = 16 // request.width if zero.parameter_alignment else 1
            return lambda named: flat.zero12(named, n, align, zero.round_robin_gradients)
        case "zero3":
            return lambda named: per_parameter.zero3(named, n, zero.sub_group_size)
        case "fsdp1" if n > 1:
            units = [[(p.name, p.shape) for p in unit] for unit in request.wrapped().values()]
            return lambda named: flat.fsdp1(units, named, n)
        case "fsdp2" | "hsdp":
            return lambda named: rows.fsdp2(named, n)
        case "tp":
            return lambda named: rows.tensor_parallel(named, n)
        case "ddp" if request.shard_state:
            return lambda named: dealt.ddp(named, n, kept)
    return shares.replicated
