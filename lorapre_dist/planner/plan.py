"""Memory per rank and bytes sent per step, of every optimizer of the comparison, from shapes alone."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .frame import frame, full, plain
from .optimizers import OPTIMIZERS, Optimizer
from .request import Request
from .spread import Array, Spread, replicated, spread

PARTS = ("weights", "gradients", "state", "workspace", "buffers")


@dataclass
class Usage:
    """Bytes of one optimizer.

    Attributes:
        memory: of each of :data:`PARTS` on each rank's device.
        host: in each rank's host memory under offload.
        sent: by purpose on each rank, by the optimizer in a step.
        frame_sent: by purpose, by the framework around it; the same on every rank.
    """

    memory: dict[str, Array]
    host: Array
    sent: dict[str, Array]
    frame_sent: dict[str, int]

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


def plan(request: Request, names: tuple[str, ...] = tuple(OPTIMIZERS)) -> dict[str, Usage]:
    """What each optimizer of ``names`` needs, by name."""
    laid_out = spread(request)
    found = {}
    for name in names:
        entry = OPTIMIZERS[name]
        alone = entry.whole or (request.layout == "ddp" and not entry.deals_out)
        found[name] = _usage(request, replicated(request) if alone else laid_out, entry)
    return found


def _usage(request: Request, spread: Spread, entry: Optimizer) -> Usage:
    costs, around = entry.costs(request, spread), plain(request) if entry.whole else frame(request, spread)
    memory = {"weights": around.weights, "gradients": around.gradients, "state": costs.state}
    memory |= {"workspace": costs.workspace, "buffers": around.buffers}
    host = around.host
    if request.offload and not entry.whole:
        host = host + costs.state + costs.workspace
        memory |= {"state": 0, "workspace": 0}
    held = {part: full(value, spread.ranks) for part, value in memory.items()}
    return Usage(held, full(host, spread.ranks), costs.sent, around.sent)


def smallest_world(request: Request, limit: int, largest: int = 4096) -> int | None:
    """The smallest power of two of ranks on each of which LoRAPre needs at most ``limit`` bytes of device memory."""
    exponents = range(largest.bit_length())

    def fits(exponent: int) -> bool:
        return bool(plan(replace(request, world_size=1 << exponent), ("LoRAPre",))["LoRAPre"].total.max() <= limit)

    found = bisect.bisect_left(exponents, True, key=fits)
    return 1 << found if found < len(exponents) else None
