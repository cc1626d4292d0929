"""The same settings under DeepSpeed, FSDP2 and DDP give the same losses, and a run moves from one to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch import forked_ranks
from tests.launch.conftest import ds_json, environment

# 12 sequences a step: three micro-batches on each of two ranks, two on each of three.
BATCH = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}
STEPS = ["--max_steps", "6", "--warmup_steps", "2", "--eval_every", "3", "--save_every", "3", "--no_tensorboard"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base_options: list[str]) -> tuple[Path, str]:
    """The folder of all runs, each in a folder of its own, and what they printed."""
    folder = tmp_path_factory.mktemp("backends")
    config = ds_json(folder / "zero2.json", **BATCH)
    bf16 = ds_json(folder / "bf16.json", **BATCH, bf16={"enabled": True})
    common = [*base_options, *STEPS, "--deepspeed_config", config, "--backend"]

    def job(name: str, world_size: int, backend: str, *options: str, origin: str = "") -> dict[str, Any]:
        """A run, or its continuation: from a copy of another run's folder as it was at step 3."""
        copy = [str(folder / origin), str(folder / name)] if origin else None
        argv = [*common, backend, *options, "--output_dir", str(folder / name)]
        return forked_ranks.job("pretrain.py", world_size, argv, copy=copy)

    short = ["--deepspeed_config", bf16, "--max_steps", "1", "--warmup_steps", "1", "--save_every", "0"]
    jobs = [
        job("zero2", 2, "deepspeed"),
        job("fsdp2", 3, "fsdp2", "--background_save", "--gradient_checkpointing"),
        job("ddp", 2, "ddp"),
        job("fsdp2 bf16", 2, "fsdp2", *short),
        job("ddp bf16", 1, "ddp", *short),
        job("zero2 to fsdp2", 3, "fsdp2", origin="zero2"),
        job("fsdp2 to zero2", 2, "deepspeed", origin="fsdp2"),
        job("ddp to fsdp2", 1, "fsdp2", origin="ddp"),
        job("fsdp2 to ddp", 2, "ddp", origin="fsdp2"),
    ]
    return folder, forked_ranks.run(folder, jobs, environment())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(reference: Path, folder: Path) -> None:
    """fp32 sums in another order: 1e-6 was seen."""
    wanted, found = rows(reference), rows(folder)
    assert [row["step"] for row in wanted] == [row["step"] for row in found] == list(range(7))
    for a, b in zip(wanted, found, strict=True):
        assert (a["lr"], a["tokens"]) == (b["lr"], b["tokens"]) if a["step"] else True
        for name, tolerance in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-4)):
            if a.get(name) is not None:
                assert b[name] == pytest.approx(a[name], rel=tolerance), (name, a["step"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_the_same_settings_give_the_same_losses(name, runs):
    folder, log = runs
    assert rows(folder / "zero2")[-1]["eval_loss"] < rows(folder / "zero2")[0]["eval_loss"] - 0.3
    assert_alike(folder / "zero2", folder / name)
    assert "of the DeepSpeed JSON: zero_optimization" in log
    assert f"layout     {name.upper()}, " in log
    config = json.loads((folder / name / "checkpoints" / "step0000006" / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["zero2 to fsdp2", "fsdp2 to zero2", "ddp to fsdp2", "fsdp2 to ddp"])
def test_a_run_moves_to_another_backend_and_world_size(name, runs):
    folder, log = runs
    assert_alike(folder / "zero2", folder / name)
    assert log.count("resuming from step0000003 at step 3") == 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_bf16_computes_in_bf16_on_fp32_weights(name, runs):
    """One step: near the fp32 losses, as near as 8 bits of mantissa are, but not the same."""
    folder, _ = runs
    for a, b in zip(rows(folder / "zero2")[:2], rows(folder / f"{name} bf16"), strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            if b.get(key) is not None and key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-2), (key, a["step"])
                assert b[key] != a[key], (key, a["step"])
