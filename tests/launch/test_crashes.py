"""A run that is killed again and again ends where the one ends that was never touched."""

from __future__ import annotations

import json

import pytest

from lorapre_dist.checkpoint import dcp
from tests.forks import Ranks
from tests.launch.conftest import TINY_LLAMA, ds_json
from tests.launch.crashing import crash

pytestmark = pytest.mark.slow


@pytest.mark.timeout(2400)
def test_kills_change_nothing(base_options, tmp_path, exhaustive):
    """SIGKILL on both ranks, half of them inside a save (in the foreground and in the background, in turn).

    Fifty times with ``--exhaustive``, otherwise four times.
    """
    kills, steps_of_run = (50, 160) if exhaustive else (4, 24)
    (tmp_path / "model.json").write_text(json.dumps(TINY_LLAMA))
    config = ds_json(tmp_path / "ds.json", params={"rank": 8})
    steps = ["--max_steps", str(steps_of_run), "--warmup_steps", "5", "--save_every", "2", "--keep_last", "3"]
    options = [*base_options, *steps, "--model_config", str(tmp_path / "model.json"), "--deepspeed_config", config]
    options += ["--eval_every", "0", "--no_tensorboard", "--output_dir"]
    codes, _, err = Ranks("pretrain.py", [*options, str(tmp_path / "whole"), "--save_every", "0"]).finish()
    assert codes == [0, 0], err

    found = crash(
        "pretrain.py",
        [*options, str(tmp_path / "killed")],
        tmp_path / "killed",
        {"killed in a save": kills // 2, "killed": kills // 2},
        options=[[], ["--background_save"]],
    )
    assert found["killed"] + found["killed in a save"] >= kills, found
    assert found["killed in a save"] >= kills // 2, found

    def rows(name: str) -> list[dict]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]

    assert rows("killed") == rows("whole")  # every loss, lr and gradient norm of every step, to the last bit
    tags = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir() if p.is_dir())
    assert tags == [f"step{n:07d}" for n in range(steps_of_run - 4, steps_of_run + 1, 2)]
    assert dcp.shapes(tmp_path / "killed" / "checkpoints" / tags[-1] / "tensors")
