"""The programs with bf16 weights that have no fp32 copy: ``weights`` of the JSON's optimizer, under every backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapre_dist.checkpoint import stored
from lorapre_dist.state.shards import MODEL, OPTIMIZER
from lorapre_dist.training.data.tokenizer import train_bpe
from tests.launch import forked_ranks
from tests.launch.conftest import REPO, TINY_LLAMA, ds_json, environment
from tests.training.conftest import documents

pytestmark = pytest.mark.slow

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
    recipe = json.loads((REPO / "ds_configs" / "llama_7b_24g.json").read_text())
    recipe["optimizer"]["params"]["rank"] = 8  # of a model as small as this
    (folder / "24g.json").write_text(json.dumps(recipe))
    argv = ["--recipe", "llama-7b-24g", *common, "--deepspeed_config", str(folder / "24g.json")]
    train_bpe(documents(100, 80), 380).save_pretrained(folder / "tokenizer")  # the recipe's own is on the hub
    argv += ["--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "24g")]
    jobs.append(forked_ranks.job("pretrain.py", 1, argv))
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


@pytest.mark.timeout(600)
def test_the_recipe_for_a_card_trains(runs):
    """With a model of a small size: bf16 weights, released gradients, recomputed activations, factors in bf16."""
    folder, _ = runs
    steps = [row["loss"] for row in rows(folder / "24g") if row["step"]]
    assert len(steps) == 2 and all(0 < loss < 7 for loss in steps)
    settings = json.loads((folder / "24g" / "settings.json").read_text())
    assert (settings["backend"], settings["gradient_checkpointing"]) == ("ddp", True)
    found = stored.tensors(stored.locate(folder / "24g"))
    factors = [name for name in found if name.startswith(OPTIMIZER) and name.endswith(".m_B")]
    assert {found[name].dtype for name in factors} == {torch.bfloat16}
    assert any("embed_tokens" in name for name in factors) and any("lm_head" in name for name in factors)
