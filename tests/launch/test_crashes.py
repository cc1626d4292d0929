"""A run that is killed again and again ends where the one ends that was never touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorapre_dist.checkpoint import dcp
from tests.launch.conftest import REPO, TINY_LLAMA, ds_json, environment, finish, launch


@pytest.mark.timeout(2400)
def test_kills_change_nothing(base_options, tmp_path, exhaustive):
    """SIGKILL on both ranks, half of them inside a save (in the foreground and in the background, in turn).

    Fifty times with ``--exhaustive``, otherwise six.
    """
    kills, steps_of_run = (50, 160) if exhaustive else (6, 30)
    (tmp_path / "model.json").write_text(json.dumps(TINY_LLAMA))
    config = ds_json(tmp_path / "ds.json", params={"rank": 8})
    steps = ["--max_steps", str(steps_of_run), "--warmup_steps", "5", "--save_every", "2", "--keep_last", "3"]
    options = [*base_options, *steps, "--model_config", str(tmp_path / "model.json"), "--deepspeed_config", config]
    options += ["--eval_every", "0", "--no_tensorboard", "--output_dir"]
    code, _, err = finish(launch(2, *options, str(tmp_path / "whole"), "--save_every", "0"))
    assert code == 0, err

    job = {
        "program": "lorapre_dist.training.run.app",
        "world_size": 2,
        "argv": [*options, str(tmp_path / "killed")],
        "options": [[], ["--background_save"]],
        "output_dir": str(tmp_path / "killed"),
        "kills": {"killed in a save": kills // 2, "killed": kills // 2},
        "seed": 1,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    script, result = Path(__file__).with_name("crashing.py"), tmp_path / "result.json"
    command = [sys.executable, str(script), str(tmp_path / "job.json"), str(result)]
    subprocess.run(command, env=environment(), cwd=REPO, timeout=2000, check=True)
    found, log = json.loads(result.read_text()), result.with_suffix(".log").read_text(errors="replace")
    assert found["error"] is None, (found, log[-3000:])
    assert found["killed"] + found["killed in a save"] >= kills, found
    assert found["killed in a save"] >= kills // 2, found

    def rows(name: str) -> list[dict]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]

    assert rows("killed") == rows("whole")  # every loss, lr and gradient norm of every step, to the last bit
    tags = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.is_dir())
    assert tags == [f"step{n:07d}" for n in range(steps_of_run - 4, steps_of_run + 1, 2)]
    assert dcp.shapes(tmp_path / "killed" / "checkpoints" / tags[-1] / "tensors")
