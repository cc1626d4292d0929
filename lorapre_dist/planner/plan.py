"""Memory per rank and bytes sent per step, of every optimizer of the comparison, from shapes alone."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorapre_dist.core.arithmetic import Work
from lorapre_dist.layouts.geometry.shares import Arrangement, replicated

from .arrange import arranged
from .frame import frame, full, plain
from .ours import costs
from .request import Request
from .rivals import RIVALS, Array, Optimizer

PARTS = ("weights", "gradients", "state", "workspace", "buffers")


@dataclass
class Usage:
    """Bytes of one optimizer.

    Attributes:
        memory: of each of :data:`PARTS` on each rank's device.
        host: in each rank's host memory under offload.
        sent: by purpose on each rank, by the optimizer in a step.
        frame_sent: by purpose, by the framework around it; the same on every rank.
        work: what a step computes, on the rank with most of it.
        calls: collectives of the optimizer in a step, on the rank with most of them.
    """

    memory: dict[str, Array]
    host: Array
    sent: dict[str, Array]
    frame_sent: dict[str, int]
    work: Work
    calls: int

    @property
    def total(self) -> Array:
        """Bytes on each rank's device."""
        return np.sum(list(self.memory.values()), axis=0)

    @property
    def fullest(self) -> int:
        """The rank that needs most."""
        return int(np.argmax(self.total + self.host))

    def summary(self) -> dict[str, Any]:
        """Bytes on the fullest rank and on average, as plain numbers: what ``--json`` prints."""

        def pick(values: Array) -> dict[str, float]:
            return {"largest": int(values.max()), "mean": round(float(values.mean()), 1)}

        largest = {part: int(values[self.fullest]) for part, values in self.memory.items()}
        mean = {part: round(float(values.mean()), 1) for part, values in self.memory.items()}
        return {
            "largest_rank": {
                "rank": self.fullest,
                **largest,
                "total": int(self.total[self.fullest]),
                "host": int(self.host[self.fullest]),
            },
            "mean": {**mean, "total": round(float(self.total.mean()), 1), "host": round(float(self.host.mean()), 1)},
            "sent_per_step": {
                "optimizer": {purpose: pick(values) for purpose, values in self.sent.items()},
                "framework": dict(self.frame_sent),
            },
        }


def names(request: Request) -> tuple[str, ...]:
    """The optimizers of a plan: the request's own, and the others that it is compared with."""
    return request.optimizer.optimizer, *RIVALS


def plan(request: Request, of: tuple[str, ...] | None = None) -> dict[str, Usage]:
    """What each optimizer needs, by name.

    Args:
        of: those of :func:`names` that are asked for; None: all.
    """
    laid_out, ours = arranged(request), request.optimizer.optimizer
    found = {ours: _usage(request, laid_out, Optimizer(costs))} if of is None or ours in of else {}
    for name, entry in RIVALS.items():
        if of is None or name in of:
            # Only ours deal their state out under DDP.
            alone = entry.whole or request.layout == "ddp"
            where = replicated([(p.name, p.shape) for p in request.parameters]) if alone else laid_out
            found[name] = _usage(request, where.matrices(request.takes), entry)
    return found


def _usage(request: Request, arrangement: Arrangement, entry: Optimizer) -> Usage:
    stated = entry.costs(request, arrangement)
    around = plain(request) if entry.whole else frame(request, arrangement)
    memory = {"weights": around.weights, "gradients": around.gradients, "state": stated.state}
    memory |= {"workspace": stated.workspace, "buffers": around.buffers}
    host = around.host
    if request.offload and not entry.whole:
        host = host + stated.state + stated.workspace
        memory |= {"state": 0, "workspace": 0}
    held = {part: full(value, arrangement.size) for part, value in memory.items()}
    return Usage(held, full(host, arrangement.size), stated.sent, around.sent, stated.work, stated.calls)


def smallest_world(request: Request, limit: int, largest: int = 4096) -> int | None:
    """The smallest power of two of ranks on each of which our optimizer needs at most ``limit`` bytes of memory."""
    exponents, ours = range(largest.bit_length()), request.optimizer.optimizer
    if request.layout == "hsdp":
        request = replace(request, shard_size=1 << (request.shard_size.bit_length() - 1))

    def fits(exponent: int) -> bool:
        return bool(plan(replace(request, world_size=1 << exponent), (ours,))[ours].total.max() <= limit)

    found = bisect.bisect_left(exponents, True, key=fits)
    return 1 << found if found < len(exponents) else None
