"""Run the training program on several ranks, several times, from one process that has the heavy imports behind it.

Reads ``[{"world_size", "argv", "output_dir", "origin"}]`` from the file named first. A run with an ``origin`` starts
from that run's folder as it was at step 3. Stops at the first run that fails, and writes the exit codes of all ranks of
each run to the file named second, and what they printed beside it, to ``.log``.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

from tests.launch.crashing import start


def main() -> None:
    for module in ("engines", "loop"):  # the heavy imports, once
        importlib.import_module(f"lorapre_dist.training.{module}")
    codes = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        target = Path(job["output_dir"])
        if job["origin"]:
            shutil.copytree(job["origin"], target)
            shutil.rmtree(target / "checkpoints" / "step0000006")
            (target / "checkpoints" / "latest").write_text("step0000003")
        argv = [*job["argv"], "--output_dir", str(target)]
        children = start(job["world_size"], argv, Path(sys.argv[2]).with_suffix(".log"))
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        if any(codes[-1]):
            break
    Path(sys.argv[2]).write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
