"""Collectives that take long: how many of a step's delays a training step feels, with ``overlap`` and without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapre_dist.core.comm import Comm
from lorapre_dist.core.interval import Peers
from lorapre_dist.layouts.base import Layout, Piece, Unit
from lorapre_dist.layouts.geometry.ranges import equal_ranges
from lorapre_dist.optimizers import OPTIMIZERS, LowRankOptimizer
from lorapre_dist.optimizers.awaiting import building_under_engine

from .ranks import spawn


class Clock:
    """The time of day."""

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def until(self, due: float) -> None:
        """Wait until then."""
        time.sleep(max(0.0, due - self.now()))


class Virtual(Clock):
    """A clock of every thread's own that runs only where the thread waits: it shows the delays that it has felt."""

    def __init__(self) -> None:
        self._of = threading.local()

    def now(self) -> float:
        """Seconds that this thread has waited."""
        return getattr(self._of, "seconds", 0.0)

    def until(self, due: float) -> None:
        """Wait until then: no time of day passes."""
        self._of.seconds = max(self.now(), due)


class Delayed(Comm):
    """Collectives whose result is there ``delay`` seconds after they were started, at the earliest."""

    def __init__(self, delay: float, clock: Clock | None = None) -> None:
        super().__init__()
        self.delay, self.clock = delay, clock or Clock()

    def _later(self, wait: Callable[[], Any]) -> Callable[[], Any]:
        due = self.clock.now() + self.delay

        def finish() -> Any:
            self.clock.until(due)
            return wait()

        return finish

    def all_gather(self, local: Tensor, group: Any, purpose: str) -> Callable[[], Tensor]:
        """As it is, but later."""
        return self._later(super().all_gather(local, group, purpose))

    def reduce_scatter(self, blocks: Tensor, group: Any, purpose: str) -> Callable[[], Tensor]:
        """As it is, but later."""
        return self._later(super().reduce_scatter(blocks, group, purpose))

    def all_reduce(self, local: Tensor, group: Any, purpose: str, largest: bool = False) -> Callable[[], Tensor]:
        """As it is, but later."""
        return self._later(super().all_reduce(local, group, purpose, largest))

    def broadcast(self, parts: list[tuple[int, Tensor]], group: Any, purpose: str, limit: int) -> Callable[[], None]:
        """As it is, but later."""
        return self._later(super().broadcast(parts, group, purpose, limit))

    def reduce(self, parts: list[tuple[int, Tensor]], group: Any, purpose: str, limit: int) -> Callable[[], None]:
        """As it is, but later."""
        return self._later(super().reduce(parts, group, purpose, limit))

    def exchange(
        self, sent: Tensor, received: Tensor, counts: list[list[int]], group: Any, purpose: str
    ) -> Callable[[], Tensor]:
        """As it is, but later."""
        return self._later(super().exchange(sent, received, counts, group, purpose))


def print_delays(kind: str, delay: float, size: int = 2) -> None:
    """Time of a training step in row shards, as under FSDP2, without delays and with them."""
    results = spawn(size, measured, kind=kind, delay=delay)
    worst = {name: max(result[name] for result in results) for name in results[0]}
    print(f"\n{kind} in row shards, {size} ranks, 8 matrices; forward and backward sleep {worst['training']:.2f} s.")
    print(f"Collectives that take {delay * 1e3:.0f} ms more each: delays that a training step feels")
    for name, label in (("plain", "as it is"), ("overlap", "with overlap")):
        late, prompt = worst[f"{name} late"], worst[f"{name} prompt"]
        text = f"{prompt * 1e3:>7.0f} ms, delayed {late * 1e3:>7.0f} ms: {(late - prompt) / delay:>5.1f} felt"
        print(f"  {label:<13} {text}, {worst[f'{name} calls']:.0f} collectives a step")


def measured(index: int, size: int, kind: str, delay: float, steps: int = 6) -> dict[str, float]:
    """One rank: seconds of a training step, and its collectives, by ``overlap`` and delay."""
    training = 12 * delay
    found = {"training": training}
    for name in ("plain", "overlap"):
        for label, late in (("prompt", 0.0), ("late", delay)):
            optimizer = rows_of(kind, size, index, overlap=name == "overlap")
            optimizer.comm = Delayed(late)
            times = []
            for _ in range(steps):
                dist.barrier()
                begin = time.perf_counter()
                time.sleep(training)
                optimizer.step()
                times.append(time.perf_counter() - begin)
            optimizer.synchronize()
            found[f"{name} {label}"] = min(times[1:])  # the first one gathers what later ones find
            found[f"{name} calls"] = sum(optimizer.comm.calls.values()) / steps
    return found


def rows_of(kind: str, size: int, index: int, overlap: bool, count: int = 8) -> LowRankOptimizer:
    """An optimizer, with gradients, of one rank's rows of some matrices, whose gradients differ as under FSDP2."""
    generator, units = torch.Generator().manual_seed(index), []
    p, q = 64, 48
    ranges = tuple((low * q, high * q) for low, high in equal_ranges(p, size))
    for k in range(count):
        start, stop = ranges[index]
        piece = torch.nn.Parameter(torch.randn(stop - start, generator=generator) * 0.02)
        piece.grad = torch.randn(stop - start, generator=generator) * 1e-3
        shared = Peers(dist.group.WORLD, ranges, index)
        units.append(Unit(piece, 0, [Piece(f"layers.{k}.q_proj.weight", (p, q), start, stop, 0, shared)]))
    with building_under_engine():
        optimizer = OPTIMIZERS[kind]([unit.tensor for unit in units], lr=1e-3, rank=8, overlap=overlap)
    optimizer.bind(Layout("row shards", units, size, spread_over=[dist.group.WORLD]))
    return optimizer
