"""Run the programs of ``launch/`` on several ranks, several times, from one process that has the imports behind it.

:func:`run` starts that process. It reads a list of jobs from the file named first, stops at the first that fails, and
writes the exit codes of all ranks of each job to the file named second, and what they printed beside it, to ``.log``.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def job(script: str, world_size: int, argv: list[str], **more: Any) -> dict[str, Any]:
    """A job: ``launch/SCRIPT`` with its options, and perhaps ``env``, or a folder to ``copy`` (from, to) before it."""
    return {"script": script, "world_size": world_size, "argv": argv, "env": {}, "copy": None, **more}


def run(folder: Path, jobs: list[dict[str, Any]], env: dict[str, str]) -> str:
    """Run all jobs; what they printed. Asserts that they ended well."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.launch.forked_ranks", str(folder / "jobs.json"), str(folder / "codes.json")]
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (folder / "codes.log").read_text()
    assert json.loads((folder / "codes.json").read_text()) == [[0] * job["world_size"] for job in jobs], log[-4000:]
    return log


def _start(job: dict[str, Any], log: Path) -> list[int]:
    """Fork the ranks of a job, which never return from here; their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(job["world_size"]):
        child = os.fork()
        if child == 0:
            try:
                with open(log, "ab", buffering=0) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world_size"], "MASTER_PORT": port}
                ranks |= {"LOCAL_WORLD_SIZE": job["world_size"], "MASTER_ADDR": "127.0.0.1", **job["env"]}
                os.environ.update({name: str(value) for name, value in ranks.items()})
                script = REPO / "launch" / job["script"]
                sys.argv, sys.path[0] = [str(script), *job["argv"]], str(script.parent)
                runpy.run_path(str(script), run_name="__main__")
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(70)  # the programs end with os._exit themselves
        children.append(child)
    return children


def _finish(job: dict[str, Any], children: list[int]) -> list[int]:
    """Exit codes; once a rank has failed the others are ended, which wait for it."""
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] > 0:
            for other in set(children) - codes.keys():
                os.kill(other, 9)
    return [codes[child] for child in children]


def main() -> None:
    """Run the jobs of the file named first."""
    for module in ("training.engines.engines", "training.run.loop", "integrations.huggingface.trainer"):  # heavy: once
        importlib.import_module(f"lorapre_dist.{module}")
    codes: list[list[int]] = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job["copy"]:
            origin, target = map(Path, job["copy"])
            shutil.copytree(origin, target)
            shutil.rmtree(target / "checkpoints" / "step0000006")
            (target / "checkpoints" / "latest").write_text("step0000003")
        codes.append(_finish(job, _start(job, Path(sys.argv[2]).with_suffix(".log"))))
        if any(codes[-1]):
            break
    Path(sys.argv[2]).write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
