"""A run of 5,000 steps: what the factors become, not in a hundred steps but in thousands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lorapre_dist.optimizers import OPTIMIZERS
from tests.launch.conftest import TINY_LLAMA, ds_json, finish, launch


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_factors_stay_where_they_are(name, tmp_path: Path, base_options):
    """Without the gauge the norms of A and B are 1e30 apart by step 1,200, and the weights NaN soon after."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_LLAMA))
    params = {"lr": 0.001 if name == "LoRAPreLion" else 0.01, "rank": 4}
    batch = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    config = ds_json(tmp_path / "ds.json", **batch, optimizer={"type": name, "params": params})
    run = ["--max_steps", "5000", "--warmup_steps", "50", "--eval_every", "500", "--save_every", "2500"]
    options = [
        "--model_config",
        str(tmp_path / "tiny.json"),
        "--deepspeed_config",
        config,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    code, _, err = finish(launch(1, *base_options, *run, *options), timeout=1700)
    assert code == 0, err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "eval_loss" in row]
    assert rows[-1]["step"] == 5000 and rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 1
    for row in rows[1:]:
        assert all(math.isfinite(row[key]) for key in ("loss", "eval_loss", "grad_norm"))
        assert row["factors_apart"] < 1e4 and row["cond_AA"] < 2 and row["cond_BB"] < 1e6, row
