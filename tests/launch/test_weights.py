"""The programs with bf16 weights that have no fp32 copy: ``weights`` of the JSON's optimizer, under every backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapre_dist.checkpoint import stored
from lorapre_dist.state.shards import MODEL, OPTIMIZER
from tests.launch import forked_ranks
from tests.launch.conftest import TINY_LLAMA, ds_json, environment

BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
#: Backend, ranks and how weights are kept.
RUNS = {
    "masters": ("ddp", 1, None),
    "fsdp2": ("fsdp2", 2, "stochastic"),
    "ddp": ("ddp", 1, "kahan"),
    "zero3": ("deepspeed", 2, "kahan"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base_options: list[str]) -> tuple[Path, str]:
    """The folder of all runs, each in a folder of its own, and what they printed."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "tiny.json").write_text(json.dumps(TINY_LLAMA))
    common = [*base_options, "--model_config", str(folder / "tiny.json"), "--no_tensorboard"]
    common += ["--max_steps", "2", "--warmup_steps", "1", "--eval_every", "2", "--save_every", "2"]
    jobs = []
    for name, (backend, world, weights) in RUNS.items():
        params = {"rank": 8} | ({} if weights is None else {"weights": weights})
        bf16 = BF16 if weights else {"enabled": True}
        config = ds_json(folder / f"{name}.json", **BATCH, params=params, bf16=bf16, zero_optimization={"stage": 3})
        argv = [*common, "--deepspeed_config", config, "--backend", backend, "--output_dir", str(folder / name)]
        jobs.append(forked_ranks.job("pretrain.py", world, argv))
    return folder, forked_ranks.run(folder, jobs, environment())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "masters"])
def test_the_model_is_bf16_under_every_backend(name, runs):
    """Its weights are saved as such, and it learns as with masters: 8 bits of significand apart, after two steps."""
    folder, log = runs
    weights = RUNS[name][2]
    assert f"(bfloat16, {weights})" in log
    found = stored.tensors(stored.locate(folder / name))
    assert {t.dtype for n, t in found.items() if n.startswith(MODEL)} == {torch.bfloat16}
    lower = [n for n in found if n.startswith(OPTIMIZER) and n.endswith(".compensation")]
    assert len(lower) == (sum(n.startswith(MODEL) for n in found) if weights == "kahan" else 0)
    for a, b in zip(rows(folder / "masters"), rows(folder / name), strict=True):
        for key in ("loss", "eval_loss"):
            if b.get(key) is not None and key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-2), (key, a["step"])
