"""Run the programs of ``launch/`` on several ranks, one run after the other, all forked (see ``tests/forks.py``)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.forks import Ranks


def job(script: str, world_size: int, argv: list[str], **more: Any) -> dict[str, Any]:
    """A job: ``launch/SCRIPT`` with its options, and perhaps ``env``, or a folder to ``copy`` (from, to) before it.

    ``before``: what ranks call first, as :class:`tests.forks.Ranks` takes it.
    """
    return {"script": script, "world_size": world_size, "argv": argv, "env": {}, "copy": None, "before": None, **more}


def run(folder: Path, jobs: list[dict[str, Any]], env: dict[str, str]) -> str:
    """Run all jobs; what they printed, which is also in ``codes.log``. Asserts that they ended well."""
    log = ""
    for job in jobs:
        if job["copy"]:
            origin, target = map(Path, job["copy"])
            shutil.copytree(origin, target)
            shutil.rmtree(target / "checkpoints" / "step0000006")
            (target / "checkpoints" / "latest").write_text("step0000003")
        ended = Ranks(job["script"], job["argv"], job["world_size"], env | job["env"], job["before"]).finish()
        log += ended.out + ended.err
        (folder / "codes.log").write_text(log)
        assert ended.codes == [0] * job["world_size"], (job, ended.out[-2000:], ended.err[-4000:])
    return log
