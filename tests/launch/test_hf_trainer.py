"""The Hugging Face Trainer example on two ranks: save, resume, and go on as the run that was never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import REPO, environment, free_port

STEPS = ["--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--learning_rate", "0.01"]
STEPS += ["--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm", "true"]


def run(launcher: list[str], output: Path, cache: Path, *options: str) -> list[dict[str, Any]]:
    """The log of a run, without times."""
    command = [sys.executable, "-m", *launcher, "launch/hf_trainer.py", "--output_dir", str(output), *STEPS, *options]
    env = environment() | {"LORAPRE_CACHE": str(cache)}
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [{k: row[k] for k in ("step", "loss", "grad_norm", "learning_rate")} for row in history if "loss" in row]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf-cache")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["ddp", "deepspeed"])
def test_the_trainer_saves_and_resumes(backend, cache, tmp_path):
    options = []
    if backend == "ddp":
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    else:
        launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
        options = ["--deepspeed", "ds_configs/hf_zero2.json"]
    whole = run(launcher, tmp_path, cache, *options)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    (tmp_path / "checkpoint-6").rename(tmp_path / "away")
    resumed = run(launcher, tmp_path, cache, *options, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert resumed == whole
