"""Memory per rank and bytes sent per step, of every optimizer of the comparison, from shapes alone."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorapre_dist.core.arithmetic import Work
from lorapre_dist.layouts.geometry.shares import Arrangement, replicated

from . import axes
from .activations import instants
from .arrange import arranged
from .frame import frame, full, plain
from .ours import Released, costs, released
from .request import Request
from .rivals import RIVALS, Array, Optimizer

PARTS = ("weights", "gradients", "state", "workspace", "buffers", "activations")
#: Of a training step, in each of which other things are there.
MOMENTS = ("forward", "backward", "step")
Parts = dict[str, Array]


@dataclass
class Usage:
    """Bytes of one optimizer.

    Attributes:
        moments: of each of :data:`MOMENTS` the parts (:data:`PARTS`) on each rank's device, when it holds most.
        host: in each rank's host memory under offload.
        sent: by purpose on each rank, by the optimizer in a step.
        frame_sent: by purpose, by the framework around it; one number where it is the same on every rank.
        work: what a step computes, on the rank with most of it.
        calls: collectives of the optimizer in a step, on the rank with most of them.
        stages: of a pipeline, whose ranks follow each other.
    """

    moments: dict[str, Parts]
    host: Array
    sent: dict[str, Array]
    frame_sent: dict[str, Any]
    work: Work
    calls: int
    stages: int = 1

    @property
    def memory(self) -> Parts:
        """The most that each part takes, at whatever moment."""
        return {part: np.max([held[part] for held in self.moments.values()], axis=0) for part in PARTS}

    @functools.cached_property
    def peak(self) -> Array:
        """The moment of each rank's peak, by its place in :data:`MOMENTS`."""
        return np.argmax([_total(self.moments[moment]) for moment in MOMENTS], axis=0)

    @functools.cached_property
    def at_peak(self) -> Parts:
        """Each part at each rank's peak."""
        return _chosen([self.moments[moment] for moment in MOMENTS], self.peak)

    @functools.cached_property
    def total(self) -> Array:
        """Bytes on each rank's device, at its peak."""
        return _total(self.at_peak)

    @property
    def fullest(self) -> int:
        """The rank that needs most."""
        return int(np.argmax(self.total + self.host))

    @property
    def when(self) -> str:
        """The moment of the fullest rank's peak."""
        return MOMENTS[int(self.peak[self.fullest])]

    @property
    def fullest_of_stages(self) -> list[int]:
        """The rank of each stage that needs most."""
        each = np.split(self.total + self.host, self.stages)
        return [k * len(one) + int(np.argmax(one)) for k, one in enumerate(each)]

    def sent_by_axis(self) -> dict[str, Array]:
        """What each rank sends in a step: by the axis of the framework's collectives, and under "optimizer" by ours."""
        found: dict[str, Any] = {}
        for purpose, count in self.frame_sent.items():
            axis = axes.axis_of(purpose)
            found[axis] = found.get(axis, 0) + full(count, len(self.total))
        found["optimizer"] = sum(self.sent.values(), np.zeros(len(self.total), np.int64))
        return found

    def summary(self) -> dict[str, Any]:
        """Bytes on the fullest rank and on average, as plain numbers: what ``--json`` prints."""

        def pick(values: Array) -> dict[str, float]:
            return {"largest": int(values.max()), "mean": round(float(values.mean()), 1)}

        largest = {part: int(values[self.fullest]) for part, values in self.at_peak.items()}
        mean = {part: round(float(values.mean()), 1) for part, values in self.at_peak.items()}
        moments = {moment: int(_total(held)[self.fullest]) for moment, held in self.moments.items()}
        return {
            "largest_rank": {
                "rank": self.fullest,
                **largest,
                "total": int(self.total[self.fullest]),
                "host": int(self.host[self.fullest]),
                "peak": self.when,
                "moments": moments,
            },
            "mean": {**mean, "total": round(float(self.total.mean()), 1), "host": round(float(self.host.mean()), 1)},
            "sent_per_step": {
                "optimizer": {purpose: pick(values) for purpose, values in self.sent.items()},
                "framework": {purpose: int(np.max(count)) for purpose, count in self.frame_sent.items()},
                "by_axis": {axis: pick(values) for axis, values in self.sent_by_axis().items()},
            },
        }


def _total(held: Parts) -> Array:
    return np.sum(list(held.values()), axis=0)


def _chosen(several: list[Parts], which: Array) -> Parts:
    """Of several holdings, on each rank the one at this place."""
    at = np.arange(len(which))
    return {part: np.stack([held[part] for held in several])[which, at] for part in PARTS}


def names(request: Request) -> tuple[str, ...]:
    """The optimizers of a plan: the request's own, and the others that it is compared with."""
    return request.optimizer.optimizer, *RIVALS


def plan(request: Request, of: tuple[str, ...] | None = None) -> dict[str, Usage]:
    """What each optimizer needs, by name.

    Args:
        of: those of :func:`names` that are asked for; None: all.
    """
    found = {}
    for name, entry in ({request.optimizer.optimizer: Optimizer(costs)} | RIVALS).items():
        if of is not None and name not in of:
            continue
        one = replace(request, pipeline=1, tensor=1, expert=1) if entry.whole else request
        found[name] = _joined([_usage(stage, _lying(stage, entry), entry) for stage in one.stages])
    return found


def _lying(request: Request, entry: Optimizer) -> Arrangement:
    """Where parameters lie for an optimizer. Only ours deal their state out under DDP."""
    if entry.costs is costs:
        return arranged(request)
    alone = entry.whole or request.layout == "ddp"
    where = replicated([(p.name, p.shape) for p in request.parameters]) if alone else arranged(request)
    return where.matrices(request.takes)


def _joined(stages: list[Usage]) -> Usage:
    """What the stages of a pipeline need, one after the other."""
    if len(stages) == 1:
        return stages[0]

    def joined(values: Iterable[Any]) -> Array:
        several = [full(value, len(stage.total)) for value, stage in zip(values, stages, strict=True)]
        return np.concatenate(several)

    def by_purpose(each: list[dict[str, Any]]) -> dict[str, Array]:
        purposes = dict.fromkeys(purpose for one in each for purpose in one)
        return {purpose: joined(one.get(purpose, 0) for one in each) for purpose in purposes}

    moments = {
        moment: {part: joined(stage.moments[moment][part] for stage in stages) for part in PARTS} for moment in MOMENTS
    }
    busiest = max(stages, key=lambda stage: stage.work.products + stage.work.moved)
    return Usage(
        moments,
        joined(stage.host for stage in stages),
        by_purpose([stage.sent for stage in stages]),
        by_purpose([stage.frame_sent for stage in stages]),
        busiest.work,
        max(stage.calls for stage in stages),
        len(stages),
    )


def _usage(request: Request, arrangement: Arrangement, entry: Optimizer) -> Usage:
    stated = entry.costs(request, arrangement)
    around = plain(request) if entry.whole else frame(request, arrangement)
    state, host = stated.state, around.host
    if request.offload and not entry.whole:
        host, state = host + state + stated.workspace, 0 * state
        stated.workspace, stated.kept = 0 * state, 0 * state

    def parts(gradients: Any, workspace: Any, buffers: Any, activations: Any = 0) -> Parts:
        values = (around.weights, gradients, state, workspace, buffers, activations)
        return {part: full(value, arrangement.size) for part, value in zip(PARTS, values, strict=True)}

    early = request.optimizer.release_gradients and entry.costs is costs
    ahead = released(request, arrangement) if early else Released()
    stepping = np.maximum(stated.kept, ahead.workspace)
    moments: dict[str, list[Parts]] = {moment: [] for moment in MOMENTS}
    held = request if entry.whole else request.local
    for instant in instants(held):
        gradients, workspace = around.backward, stated.kept
        if early and instant.name == "end" and ahead.waiting is not None:
            gradients = ahead.waiting
        elif early and instant.graded:
            gradients, workspace = ahead.together, stepping
        elif request.accumulation == 1 and not around.flat:
            graded = max(0, instant.graded - around.late.get(instant.name, 0))
            gradients = gradients * graded // held.elements
        buffers = around.during.get(instant.name, around.buffers)
        activations = instant.bytes + request.width * instant.cast
        moments[instant.moment].append(parts(gradients, workspace, buffers, activations))
    if early:
        moments["step"].append(parts(ahead.together, stepping, around.left))
    else:
        moments["step"].append(parts(around.gradients, stated.workspace, around.left))
        moments["step"].append(parts(around.norm, stated.kept, around.left))
    worst = {name: _chosen(some, np.argmax([_total(one) for one in some], axis=0)) for name, some in moments.items()}
    return Usage(worst, full(host, arrangement.size), stated.sent, around.sent, stated.work, stated.calls)


def smallest_world(request: Request, limit: int, largest: int = 4096) -> int | None:
    """The fewest ranks on each of which our optimizer needs at most ``limit`` bytes of memory.

    Of powers of two; with a pipeline or tensor parallelism, of so many copies of the model.
    """
    exponents, ours = range((largest // request.model_ranks).bit_length()), request.optimizer.optimizer
    if request.layout == "hsdp":
        request = replace(request, shard_size=1 << (request.shard_size.bit_length() - 1))

    def fits(exponent: int) -> bool:
        asked = replace(request, world_size=request.model_ranks << exponent)
        return bool(plan(asked, (ours,))[ours].total.max() <= limit)

    found = bisect.bisect_left(exponents, True, key=fits)
    return request.model_ranks << found if found < len(exponents) else None
