"""Which runs a contender still needs: the best lr is looked for with short runs, then long ones are done with it.

Everything follows from the settings and the records that are there, so that a table is extended, not done again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorapre_dist.bench.training import Training

from .setting import Setting
from .store import Record

Get = Callable[[Setting], Record | None]
#: Learning rates that are tried at most beyond those a contender begins with.
BEYOND = 6
#: Of a run's steps, rising learning rates take this part at most: short runs have a schedule like that of long ones.
SHARE_OF_WARMUP = 4


@dataclass(frozen=True)
class Protocol:
    """How every contender is treated.

    Attributes:
        training: what all runs share.
        steps: of the runs of which the loss is compared, one for each of ``seeds``.
        screen_steps: of the runs that look for the lr, with the first seed.
        lrs: in place of each contender's own; one alone is used as it is.
        points: of the long runs' curves.
        point_sequences: see :class:`.setting.Setting`.
    """

    training: Training
    steps: int
    screen_steps: int
    seeds: tuple[int, ...]
    lrs: tuple[float, ...] = ()
    points: int = 10
    point_sequences: int = 64

    def screen(self, contender: str, lr: float) -> Setting:
        """The short run that tries a learning rate."""
        return self._run(contender, lr, self.seeds[0], self.screen_steps, 0)

    def final(self, contender: str, lr: float, seed: int) -> Setting:
        """The long run of a seed."""
        return replace(self._run(contender, lr, seed, self.steps, self.points), point_sequences=self.point_sequences)

    def _run(self, contender: str, lr: float, seed: int, steps: int, points: int) -> Setting:
        kept = replace(self.training, warmup=min(self.training.warmup, steps // SHARE_OF_WARMUP))
        return Setting(**vars(kept), contender=contender, lr=lr, seed=seed, steps=steps, points=points)


@dataclass(frozen=True)
class Search:
    """What the short runs have shown.

    Attributes:
        losses: by learning rate, in rising order; infinite where it diverged.
        wanted: learning rates of runs that are missing.
        error: why the contender cannot run, where it cannot.
        given: the learning rate, where it is not looked for.
    """

    losses: dict[float, float]
    wanted: list[float]
    error: str | None = None
    given: float | None = None

    @property
    def best(self) -> float | None:
        """The learning rate of the lowest loss, once nothing is missing."""
        if self.given is not None or self.wanted or not self.losses or math.isinf(min(self.losses.values())):
            return self.given
        return min(self.losses, key=lambda lr: self.losses[lr])

    @property
    def inside(self) -> bool:
        """Whether the best one has tried neighbours on both sides."""
        return self.best in sorted(self.losses)[1:-1]


def search(contender: str, own: tuple[float, ...], protocol: Protocol, get: Get) -> Search:
    """The search for a contender's learning rate, which goes on beyond its ``own`` while an end is best."""
    grid = list(protocol.lrs or own)
    if len(grid) == 1:
        return Search({}, [], given=grid[0])
    losses: dict[float, float] = {}
    for _ in range(BEYOND + 1):
        records = {lr: get(protocol.screen(contender, lr)) for lr in grid}
        failed = next((r["error"] for r in records.values() if r and "error" in r), None)
        if failed:
            return Search({}, [], failed)
        losses = {lr: _loss(record) for lr, record in sorted(records.items()) if record}
        lacking = [lr for lr, record in records.items() if record is None]
        if lacking:
            return Search(losses, lacking)
        best = min(losses, key=lambda lr: losses[lr])
        if best not in (min(grid), max(grid)):
            break
        grid.append(_beyond(best, grid, all(map(math.isinf, losses.values()))))
    return Search(losses, [])


def _beyond(best: float, grid: list[float], diverged: bool) -> float:
    """Half the lowest learning rate or twice the highest, rounded so that it is found again by its value."""
    factor = 0.5 if diverged or best == min(grid) else 2.0
    return float(f"{(min(grid) if factor < 1 else max(grid)) * factor:.6g}")


def _loss(record: Record) -> float:
    return math.inf if record["val_loss"] is None else record["val_loss"]


def missing(contender: str, own: tuple[float, ...], protocol: Protocol, get: Get) -> list[Setting]:
    """The runs that can be done now, those of the first seed first; none once a contender is done or cannot run."""
    found = search(contender, own, protocol, get)
    if found.wanted:
        return [protocol.screen(contender, lr) for lr in found.wanted]
    best = found.best
    if best is None:
        return []
    runs = [protocol.final(contender, best, seed) for seed in protocol.seeds]
    if any("error" in (get(run) or {}) for run in runs):
        return []
    return [run for run in runs if get(run) is None]


def round_of(setting: Setting, protocol: Protocol) -> int:
    """Which of the rounds over all contenders a run belongs to: first the searches, then seed by seed."""
    return 0 if setting == protocol.screen(setting.contender, setting.lr) else 1 + protocol.seeds.index(setting.seed)
