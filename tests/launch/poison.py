"""Runs whose loss, and so the gradient, is no number at some steps: started, and started again without that.

Forks the ranks from one process that has the heavy imports behind it. Reads a list of jobs from the file named first
(``argv``, ``log``, ``steps``: those that are poisoned, None for all from the last named one on) and writes the exit
codes of each to the file named second.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from tests.launch.crashing import start

PROGRAM = "lorapre_dist.training.run.app"


def poison(steps: list[int]) -> None:
    """Multiply the loss of these steps (0 is the first) by NaN; -1 at the end stands for all later ones."""
    loop = importlib.import_module("lorapre_dist.training.run.loop")
    loss = loop.Trainer.loss

    def poisoned(trainer, micro_batch):
        forever = bool(steps) and steps[-1] == -1 and trainer.step >= min(steps[:-1])
        factor = float("nan") if trainer.step in steps or forever else 1.0
        return loss(trainer, micro_batch) * factor

    loop.Trainer.loss = poisoned


def main() -> None:
    for module in ("engines.engines", "run.loop"):  # the heavy imports, once
        importlib.import_module(f"lorapre_dist.training.{module}")
    original = importlib.import_module("lorapre_dist.training.run.loop").Trainer.loss
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        importlib.import_module("lorapre_dist.training.run.loop").Trainer.loss = original
        poison(job["steps"])
        children = start(PROGRAM, 2, job["argv"], Path(job["log"]))
        results.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
