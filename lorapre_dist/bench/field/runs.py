"""One training run of ``bench field``: what it depends on, and what is measured."""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import math
import platform
import statistics
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from lorapre_dist.bench import quality
from lorapre_dist.training.engines.schedule import scheduler_factory

from .contender import Beside, Contender
from .registry import contender
from .setting import Setting, Training

#: Held-out sequences on which a curve's points are evaluated; the loss at the end is that of all.
ON_THE_WAY = 64
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


@functools.lru_cache(maxsize=2)
def task(training: Training, seed: int, steps: int, data_cache: str) -> quality.Task:
    """The first weights, and the batches in their order."""
    options = vars(training) | {"seed": seed, "steps": steps, "data_cache": data_cache, "eval_at": ()}
    return quality.prepare(argparse.Namespace(**options))


def run(setting: Setting, place: Place) -> dict[str, Any]:
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


def _measured(setting: Setting, chosen: Contender, place: Place) -> dict[str, Any]:
    begin = time.process_time()
    data = task(setting.training, setting.seed, setting.steps, place.data_cache)
    torch.manual_seed(setting.seed)
    model = copy.deepcopy(data.model).train().to(place.device)
    optimizer = Beside(model, setting.lr, chosen)
    scheduler = scheduler_factory(data.warmup, setting.steps)(optimizer)
    every = max(1, setting.steps // setting.points) if setting.points else setting.steps + 1
    digest = hashlib.blake2b(digest_size=8)
    curve: dict[int, float | None] = {}
    losses: list[float] = []
    growth = kept = 0
    for step, tokens in enumerate(data.batches, 1):
        digest.update(tokens.numpy().tobytes())
        losses.append(backward(model, tokens, place, setting.precision))
        nn.utils.clip_grad_norm_(model.parameters(), quality.CLIP)
        if step == WATCHED:
            growth, kept = step_growth(optimizer, place.device), optimizer.kept_bytes()
        else:
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if not math.isfinite(losses[-1]):
            break
        if step % every == 0:
            curve[step] = finite(quality.held_out_loss(model, data.held_out[:ON_THE_WAY], place.micro_batch))
            model.train()
    val_loss = quality.held_out_loss(model, data.held_out, place.micro_batch)
    # Neither the first step, which makes the state, nor the watched one says how long a step takes.
    seconds = optimizer.seconds[WATCHED:] or optimizer.seconds
    return {
        "val_loss": finite(val_loss),
        "curve": curve,
        "train_loss": finite(statistics.mean(losses[-50:])),
        "rank": chosen.rank(model),
        "state_bytes": optimizer.state_bytes(),
        "kept_bytes": kept,
        "peak_bytes": kept + growth,
        "step_ms": round(1e3 * statistics.mean(seconds), 3),
        "seconds": round(time.process_time() - begin, 1),
        "tokens": digest.hexdigest(),
    }


def backward(model: nn.Module, tokens: torch.Tensor, place: Place, precision: str) -> float:
    """Gradients of the mean loss over ``tokens (batch, seq_len)``; returns the loss, infinite where it is no number."""
    total = 0.0
    for part in tokens.split(place.micro_batch):
        part = part.to(place.device)
        with torch.autocast(place.device.partition(":")[0], torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=part, labels=part).loss * (len(part) / len(tokens))
        loss.backward()
        total += loss.item()
    return total if math.isfinite(total) else math.inf


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
