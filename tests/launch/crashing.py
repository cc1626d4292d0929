"""Kill a training run with SIGKILL again and again, at random moments and inside saves, until it has had enough kills.

Forks the ranks of every attempt from one process that has the heavy imports behind it. Reads a JSON job from the file
named first (``program``: its module, ``world_size``, ``argv``, ``options``: more of them per attempt, in turn,
``output_dir``, ``kills``: how many "killed in a save", how many "killed" anywhere, ``seed``) and writes what happened
to the file named second.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any


def start(program: str, world_size: int, argv: list[str], log: Path) -> list[int]:
    """Fork the ranks of one attempt; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 70
            try:
                with open(log, "ab", buffering=0) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                os.environ.update(address | ranks)
                code = importlib.import_module(program).main(argv)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def ended(children: list[int]) -> dict[int, int]:
    """Exit codes of those that have ended, by process."""
    codes = {}
    for child in children:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes


class Attempt:
    """One start of the run; ``wait`` ends with a kill, or with the run."""

    def __init__(self, job: dict[str, Any], number: int, log: Path) -> None:
        options = job["options"][number % len(job["options"])]
        self.checkpoints = Path(job["output_dir"]) / "checkpoints"
        self.begun = time.time()
        self.children = start(job["program"], job["world_size"], [*job["argv"], *options], log)
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
            codes = ended(self.children)
            if codes:
                return self._finish(codes)
            if kill == "save" and self._saving() and len(self._tags() - self.before) >= after:
                time.sleep(pause)
                return self._kill()
            if kill == "anywhere" and time.monotonic() - begun > until:
                return self._kill()
            time.sleep(0.001)
        self._kill()
        raise TimeoutError("an attempt neither ended nor saved")

    def _kill(self) -> str:
        inside = self._saving()
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        for child in self.children:
            os.waitpid(child, 0)
        return "killed in a save" if inside and self._saving() else "killed"

    def _finish(self, codes: dict[int, int]) -> str:
        while len(codes) < len(self.children) and not any(codes.values()):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):
            # The others may wait for the one that failed.
            self.children = [child for child in self.children if child not in codes]
            self._kill()
            raise RuntimeError(f"exit codes {list(codes.values())}")
        return "done"


def main() -> None:
    for module in ("engines.engines", "run.loop"):  # the heavy imports, once
        importlib.import_module(f"lorapre_dist.training.{module}")
    job = json.loads(Path(sys.argv[1]).read_text())
    chance, counts = random.Random(job["seed"]), {"killed": 0, "killed in a save": 0, "done": 0}
    log, number, error = Path(sys.argv[2]).with_suffix(".log"), 0, None
    try:
        while counts["done"] == 0:
            if number > 5 * sum(job["kills"].values()):
                raise TimeoutError("too many attempts")
            kinds = (("save", "killed in a save"), ("anywhere", "killed"))
            wanted = [kind for kind, label in kinds if counts[label] < job["kills"][label]]
            counts[Attempt(job, number, log).wait(chance.choice(wanted) if wanted else None, chance)] += 1
            number += 1
    except (RuntimeError, TimeoutError) as caught:
        error = f"attempt {number}: {caught}"
    Path(sys.argv[2]).write_text(json.dumps({**counts, "error": error, "attempts": number}))


if __name__ == "__main__":
    main()
