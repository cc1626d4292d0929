"""A two-rank run whose storage fails in the middle: it saves, says so, and goes on when it is started again."""

from __future__ import annotations

import json

import pytest

from tests.forks import Ranks
from tests.launch.conftest import ds_json
from tests.launch.test_resume import rows
from tests.training import flaky
from tests.training.conftest import documents

pytestmark = pytest.mark.slow

STEPS = 24


@pytest.mark.timeout(500)
def test_storage_that_fails_for_good_leaves_a_run_that_goes_on(tmp_path, data_cache):
    """128 shards of some eight sequences, of which 64 are open at once: the others are opened in the middle."""
    texts = documents(256, 80)
    for shard in range(128):
        part = [json.dumps({"text": text}) + "\n" for text in texts[shard::128]]
        (tmp_path / f"part-{shard:03d}.jsonl").write_text("".join(part))
    config = ds_json(tmp_path / "ds.json", train_batch_size=32, train_micro_batch_size_per_gpu=16)
    options = ["--dataset", f"flaky://{tmp_path}/part-*.jsonl", "--shuffle_buffer", "64", "--read_attempts", "2"]
    options += ["--data_cache", str(data_cache), "--vocab_size", "400", "--seq_len", "64", "--eval_batches", "1"]
    options += ["--deepspeed_config", config, "--max_steps", str(STEPS), "--warmup_steps", "3", "--eval_every", "0"]
    options += ["--no_progress", "--no_tensorboard", "--output_dir"]
    outage, metrics = tmp_path / "outage", tmp_path / "run" / "metrics.jsonl"

    def start(name: str) -> Ranks:
        argv = [*options, str(tmp_path / name)]
        return Ranks("pretrain.py", argv, env={"FLAKY_OUTAGE": str(outage)}, before=(flaky.register,))

    whole = start("whole").finish()
    run = start("run")
    run.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
    outage.touch()
    failed = run.finish()
    outage.unlink()
    again = start("run").finish()
    assert (whole.codes, failed.codes, again.codes) == ([0, 0], [1, 1], [0, 0]), (whole, failed, again)

    line = [text for text in failed.err.splitlines() if text.startswith("error: ")]
    assert len(line) == 1
    assert "cannot be read, tried 2 times: " in line[0]  # and which file
    assert ".jsonl: ConnectionResetError: connection reset by the storage; saved step" in line[0]
    step = int(line[0].split("saved step ")[1].split(",")[0])
    assert 2 <= step < STEPS
    assert f"resuming from step{step:07d} at step {step}" in again.out + again.err
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
