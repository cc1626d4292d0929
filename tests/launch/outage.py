"""Three starts of a two-rank run that streams from ``flaky://``: left alone, through an outage, and after it.

Forks the ranks from one process that has the heavy imports behind it. Reads a JSON job from the file named first
(``argv``, and the folders ``whole`` and ``run``) and writes the exit codes of each start beside its log.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

from tests.launch.crashing import start
from tests.training import flaky

PROGRAM = "lorapre_dist.training.run.app"


def codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    for module in ("engines.engines", "run.loop"):  # the heavy imports, once
        importlib.import_module(f"lorapre_dist.training.{module}")
    flaky.register()
    job = json.loads(Path(sys.argv[1]).read_text())
    whole, run = Path(job["whole"]), Path(job["run"])
    outage = Path(os.environ["FLAKY_OUTAGE"])
    result = {"whole": codes(start(PROGRAM, 2, [*job["argv"], "--output_dir", str(whole)], whole.with_suffix(".log")))}

    children = start(PROGRAM, 2, [*job["argv"], "--output_dir", str(run)], run.with_suffix(".log"))
    metrics, end = run / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    outage.touch()
    result["run"] = codes(children)
    outage.unlink()
    result["again"] = codes(start(PROGRAM, 2, [*job["argv"], "--output_dir", str(run)], run.with_name("again.log")))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
