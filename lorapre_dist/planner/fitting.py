"""Which options make a run fit into a device's memory: the mildest that do.

They are tried in the order of :data:`RUNGS`, each on top of those before: first what changes no number of the result,
then by what it may cost in quality (docs/results/quality.md), last what costs time. What turns out not to be needed is
left out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lorapre_dist.config import ConfigError

from .plan import Usage, plan
from .request import OFFLOADING, Request

#: Option and value, from the mildest to the harshest. ``gradient_checkpointing`` and ``offload`` are the run's, the
#: others the optimizer's.
RUNGS: tuple[tuple[str, str | bool], ...] = (
    ("gradient_checkpointing", True),
    ("release_gradients", True),
    ("weights", "kahan"),
    ("state_dtype", "bf16"),
    ("other_state", "adamw8bit"),
    ("weights", "stochastic"),
    ("state_dtype", "8bit"),
    ("embeddings", "low_rank"),
    ("offload", True),
)
Options = dict[str, "str | bool"]


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        fits: whether there are such options.
        options: the mildest that make it fit; if none do, all, with which it takes least.
        bytes: on the fullest rank with them.
    """

    fits: bool
    options: Options
    bytes: int

    def __str__(self) -> str:
        return ", ".join(name if value is True else f"{name}={value}" for name, value in self.options.items())


def mildest(request: Request, limit: int) -> Fit:
    """The mildest options with which a rank needs at most ``limit`` bytes; those of the request stay as they are."""
    least = Fit(False, {}, _peak(request))
    if least.bytes <= limit:
        return replace(least, fits=True)
    options: Options = {}
    for name, value in RUNGS:
        tried = options | {name: value}
        asked = _with(request, tried) if _helps(request, name, value) else None
        if asked is None:
            continue
        options = tried
        size = _peak(asked)
        if size < least.bytes:
            least = Fit(False, options, size)
        if size <= limit:
            return _pruned(request, options, limit)
    return least


def _pruned(request: Request, options: Options, limit: int) -> Fit:
    """Without what is not needed, the harshest first."""
    for name in [name for name, _ in reversed(RUNGS) if name in options]:
        for fewer in _milder(options, name):
            asked = _with(request, fewer)
            if asked is not None and _peak(asked) <= limit:
                options = fewer
                break
    asked = _with(request, options)
    assert asked is not None
    return Fit(True, options, _peak(asked))


def _milder(options: Options, name: str) -> Iterator[Options]:
    """The same without an option, or with one of its milder values."""
    if name not in options:
        return
    yield {key: value for key, value in options.items() if key != name}
    for other, value in RUNGS:
        if other == name and value != options[name]:
            yield options | {name: value}
        elif (other, value) == (name, options[name]):
            return


def _helps(request: Request, name: str, value: str | bool) -> bool:
    """Whether an option is one for this run, and more than the request has."""
    ours = request.optimizer
    if name == "gradient_checkpointing":
        return request.seq_len is not None and not request.checkpointing
    if name == "offload":
        return request.layout in OFFLOADING and not request.offload
    if name == "weights":
        return request.precision == "bf16" and ours.weights in (None, "master", "kahan") and ours.weights != value
    if name == "state_dtype":
        return ours.state_dtype != "8bit" and ours.state_dtype != value
    if name == "other_state":
        return ours.other_state == "adamw"
    return bool(getattr(ours, name) != value)


def _with(request: Request, options: Options) -> Request | None:
    """The request with these options; None where they are none for it."""
    run = {"gradient_checkpointing": "checkpointing", "offload": "offload"}
    try:
        settings: dict[str, Any] = {k: v for k, v in options.items() if k not in run}
        rest: dict[str, Any] = {run[k]: v for k, v in options.items() if k in run}
        return replace(request, optimizer=replace(request.optimizer, **settings), **rest)
    except ConfigError:
        return None


def usage(request: Request) -> Usage:
    """Of the request's own optimizer."""
    name = request.optimizer.optimizer
    return plan(request, (name,))[name]


def _peak(request: Request) -> int:
    return int(usage(request).total.max())
