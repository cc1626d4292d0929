"""A two-rank run whose storage fails in the middle: it saves, says so, and goes on when it is started again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.launch import conftest
from tests.launch.conftest import ds_json, finish, launch, wait_for
from tests.launch.test_resume import rows
from tests.training.conftest import documents

STEPS = 16


@pytest.mark.timeout(600)
def test_storage_that_fails_for_good_leaves_a_run_that_goes_on(tmp_path, data_cache, monkeypatch):
    from datasets import Dataset

    texts = documents(400, 80)
    for shard in range(3):
        part = Dataset.from_dict({"text": texts[shard::3]})
        part.to_parquet(str(tmp_path / f"part-{shard}.parquet"), batch_size=8)
    outage = tmp_path / "outage"
    plain = conftest.environment

    def environment() -> dict[str, str]:
        found = plain()
        path = os.pathsep.join([str(Path(__file__).with_name("outage")), found["PYTHONPATH"]])
        return found | {"PYTHONPATH": path, "FLAKY_OUTAGE": str(outage)}

    monkeypatch.setattr(conftest, "environment", environment)
    config = ds_json(tmp_path / "ds.json", train_batch_size=32, train_micro_batch_size_per_gpu=16)
    options = ["--dataset", f"flaky://{tmp_path}/part-*.parquet", "--shuffle_buffer", "4", "--read_attempts", "2"]
    options += ["--data_cache", str(data_cache), "--vocab_size", "400", "--seq_len", "64", "--eval_batches", "1"]
    options += ["--deepspeed_config", config, "--max_steps", str(STEPS), "--warmup_steps", "3", "--eval_every", "0"]
    options += ["--no_progress", "--no_tensorboard", "--output_dir"]

    code, _, err = finish(launch(2, *options, str(tmp_path / "whole")))
    assert code == 0, err

    process = launch(2, *options, str(tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 120, process)
    outage.touch()
    code, _, err = finish(process)
    line: Any = next(text for text in err.splitlines() if text.startswith("error: "))
    assert code != 0
    assert "cannot be read, tried 2 times: ConnectionResetError: connection reset by the storage; saved step" in line
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert 2 <= step < STEPS
    assert f"saved step {step}, start again" in line

    outage.unlink()
    code, out, err = finish(launch(2, *options, str(tmp_path / "run")))
    assert code == 0, err
    assert f"resuming from step{step:07d} at step {step}" in out
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
