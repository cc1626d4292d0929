"""Kill a training run with SIGKILL again and again, at random moments and inside saves."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.forks import Ranks

KINDS = (("save", "killed in a save"), ("anywhere", "killed"))
#: An attempt that is to be killed anywhere gets no further: on a quick machine it would end.
MOST_SAVES = 2


def crash(
    script: str,
    argv: Sequence[str],
    output_dir: Path,
    kills: dict[str, int],
    world_size: int = 2,
    options: Sequence[Sequence[str]] = ((),),
    seed: int = 1,
) -> dict[str, int]:
    """Start the program until it ends well; how often it was killed, by kind.

    Args:
        script: The program, relative to ``launch/``.
        argv: Its options.
        output_dir: Where it writes.
        kills: How many "killed in a save", how many "killed" anywhere.
        world_size: Its ranks.
        options: More options for the attempts, in turn.
        seed: Of the moments.
    """
    chance, counts, number = random.Random(seed), {"killed": 0, "killed in a save": 0, "done": 0}, 0
    while counts["done"] == 0:
        assert number <= 5 * sum(kills.values()), f"too many attempts: {counts}"
        wanted = [kind for kind, label in KINDS if counts[label] < kills[label]]
        attempt = Attempt(Ranks(script, [*argv, *options[number % len(options)]], world_size), output_dir)
        counts[attempt.wait(chance.choice(wanted) if wanted else None, chance)] += 1
        number += 1
    return counts


class Attempt:
    """One start of the run; ``wait`` ends with a kill, or with the run."""

    def __init__(self, ranks: Ranks, output_dir: Path) -> None:
        self.ranks, self.checkpoints = ranks, output_dir / "checkpoints"
        self.begun = time.time()
        self.before = self._tags()

    def _tags(self) -> set[str]:
        return {p.name for p in self.checkpoints.glob("step*")} if self.checkpoints.is_dir() else set()

    def _saving(self) -> bool:
        """Whether a save of this attempt is on its way; what an earlier one left does not count."""
        for path in self.checkpoints.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > self.begun:
                    return True
        return False

    def wait(self, kill: str | None, chance: random.Random, limit: float = 120.0) -> str:
        """``kill``: None, "save" or "anywhere"; returns "killed in a save", "killed" or "done"."""
        after, until = chance.randint(0, 1), chance.uniform(0.0, 4.0)
        pause, begun = chance.uniform(0.0, 0.06), time.monotonic()
        while time.monotonic() - begun < limit:
            if any(code is not None for code in self.ranks.codes):
                codes, out, err = self.ranks.finish(limit)
                assert not any(codes), (codes, out[-3000:], err[-3000:])
                return "done"
            if kill == "save" and self._saving() and len(self._tags() - self.before) >= after:
                time.sleep(pause)
                return self._kill()
            if kill == "anywhere" and (
                time.monotonic() - begun > until or len(self._tags() - self.before) >= MOST_SAVES
            ):
                return self._kill()
            time.sleep(0.001)
        codes, out, err = self.ranks.kill()
        raise AssertionError(f"an attempt neither ended nor saved: {codes}\n{out[-3000:]}\n{err[-3000:]}")

    def _kill(self) -> str:
        inside = self._saving()
        self.ranks.kill()
        return "killed in a save" if inside and self._saving() else "killed"
