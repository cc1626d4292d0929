"""One training run of ``bench field``: what it depends on, and what is measured."""

from __future__ import annotations

import copy
import functools
import math
import platform
import statistics
import time
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

from lorapre_dist.bench import training

from .contender import Beside, Contender
from .registry import contender
from .setting import Setting
from .store import Record

#: The step whose allocations are followed: state has been made in the first.
WATCHED = 2


@dataclass(frozen=True)
class Place:
    """Where and how a run is done, which its result does not depend on but for rounding.

    Attributes:
        device: ``"cpu"`` or a CUDA device.
        micro_batch: sequences of one forward and backward; the step's are worked off in such parts.
        data_cache: folder of tokenizers and tokenised text.
    """

    device: str
    micro_batch: int
    data_cache: str


prepared = functools.lru_cache(maxsize=2)(training.prepare)


def run(setting: Setting, place: Place) -> Record:
    """Train and evaluate; the record, ready for JSON.

    The losses are nats per token, None if it diverged. ``error`` says why there is nothing else.
    """
    record = setting.as_record()
    try:
        chosen = contender(setting.contender)
        return record | _measured(setting, chosen, place) | {"where": where(place.device)} | versions(chosen)
    except Exception as error:  # a package's, of whatever kind: it must not end the others' runs
        return record | {"error": one_line(error)}


def one_line(error: BaseException) -> str:
    """The first line of a message, with its class where it does not speak for itself."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _measured(setting: Setting, chosen: Contender, place: Place) -> Record:
    begin = time.process_time()
    task = prepared(setting.training, setting.steps, setting.seed, place.data_cache)
    torch.manual_seed(setting.seed)
    model = copy.deepcopy(task.model).to(place.device)
    optimizer = Beside(model, setting.lr, chosen)
    memory = {"kept_bytes": 0, "peak_bytes": 0}

    def step(number: int) -> None:
        if number != WATCHED:
            optimizer.step()
        else:
            growth = step_growth(optimizer, place.device)
            kept = optimizer.kept_bytes()
            memory.update(kept_bytes=kept, peak_bytes=kept + growth)

    def loss_on(held_out: np.ndarray) -> float | None:
        return finite(training.held_out_loss(model, held_out, place.micro_batch))

    every = max(1, setting.steps // setting.points) if setting.points else setting.steps + 1
    curve = {}
    for number, _ in training.steps(task, model, optimizer, place.micro_batch, step):
        if number % every == 0:
            curve[str(number)] = loss_on(task.held_out[: setting.point_sequences or None])
    # Neither the first step, which makes the state, nor the watched one says how long a step takes.
    seconds = optimizer.seconds[WATCHED:] or optimizer.seconds
    return {
        "val_loss": loss_on(task.held_out),
        "curve": curve,
        "rank": chosen.rank(model),
        "state_bytes": optimizer.state_bytes(),
        **memory,
        "step_ms": round(1e3 * statistics.mean(seconds), 3),
        "seconds": round(time.process_time() - begin, 1),
        "tokens": task.digest,
    }


def step_growth(optimizer: Beside, device: str) -> int:
    """Bytes by which the contender's step grows the tensors that are alive, at its most; it takes that step."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        optimizer.step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def finite(loss: float) -> float | None:
    """A loss as JSON can hold it."""
    return round(loss, 5) if math.isfinite(loss) else None


def where(device: str) -> str:
    """The processor or GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def versions(chosen: Contender) -> dict[str, dict[str, str]]:
    """Of torch and the contender's package."""
    names = ["torch", *([chosen.package] if chosen.package else [])]
    return {"versions": {name: metadata.version(name) for name in names}}
