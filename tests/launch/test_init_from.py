"""Continued pre-training: the first evaluation is the saved model's, however its weights are spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.sequences import prepare_data
from lorapre_dist.training.data.tokenizer import train_bpe
from lorapre_dist.training.run.settings import load_settings
from tests.launch import forked_ranks
from tests.launch.conftest import TINY_LLAMA, ds_json, environment
from tests.training.conftest import documents

pytestmark = pytest.mark.slow

RUNS = {"zero2": ("deepspeed", 2), "zero3": ("deepspeed", 3), "fsdp2": ("fsdp2", 2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with its tokenizer, in several files and bf16; large weights give it a loss of its own."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer: PreTrainedTokenizerBase = train_bpe(documents(100, 80), 380)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    saved = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA, num_key_value_heads=1, initializer_range=0.3))
    saved.bfloat16().save_pretrained(folder, max_shard_size="50KB")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base_options: list[str], model: Path) -> tuple[Path, str]:
    """Two steps under each layout, on two ranks; under ZeRO-3 also the second one of them resumed."""
    folder = tmp_path_factory.mktemp("init")
    steps = ["--warmup_steps", "1", "--eval_every", "1", "--save_every", "1", "--no_tensorboard"]
    jobs = []
    for name, (backend, stage) in RUNS.items():
        config = ds_json(folder / f"{name}.json", zero_optimization={"stage": stage})
        argv = [*base_options, *steps, "--init_from", str(model), "--backend", backend, "--deepspeed_config", config]
        argv += ["--output_dir", str(folder / name)]
        jobs.append(forked_ranks.job("pretrain.py", 2, [*argv, "--max_steps", "1"]))
    jobs.append(forked_ranks.job("pretrain.py", 2, [*jobs[1]["argv"], "--max_steps", "2"]))
    return folder, forked_ranks.run(folder, jobs, environment())


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in rows]


@pytest.fixture(scope="module")
def wanted(base_options: list[str], model: Path, runs: tuple[Path, str]) -> float:
    """The saved model's loss on the held-out text."""
    options = ["--init_from", str(model), "--max_steps", "1", "--deepspeed_config", str(runs[0] / "zero2.json")]
    settings = load_settings([*base_options, *options], 2)
    data = prepare_data(settings, BatchPlan(8, 2, 2, 0), 400)
    tokens = torch.from_numpy(data.held_out.astype("int64"))
    saved: Any = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(saved(input_ids=tokens, labels=tokens).loss)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RUNS)
def test_the_first_evaluation_is_the_saved_models(name, runs, wanted):
    folder, log = runs
    found = losses(folder / name)
    # fp32, sums in another order.
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert wanted > 7, "far from log(400), a random model's"
    assert found[1] < found[0] - 0.01
    assert log.count("vocabulary 380, its own weights") == 4


@pytest.mark.timeout(600)
def test_it_goes_on_from_its_checkpoint(runs):
    folder, log = runs
    assert "resuming from step0000001 at step 1" in log
    before, after = losses(folder / "zero3")[1:]
    assert after < before - 0.01
