"""The same settings under DeepSpeed, FSDP2 and DDP give the same losses, and a run moves from one to another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorapre_dist import cli
from tests.launch import forked_ranks
from tests.launch.conftest import ds_json, environment

pytestmark = pytest.mark.slow

# 12 sequences a step: three micro-batches on each of two ranks, two on each of three.
BATCH = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}
STEPS = ["--max_steps", "6", "--warmup_steps", "2", "--eval_every", "3", "--save_every", "3", "--no_tensorboard"]
BACKENDS = {"zero2": "deepspeed", "fsdp2": "fsdp2", "ddp": "ddp"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base_options: list[str]) -> tuple[Path, str]:
    """The folder of all runs, each in a folder of its own, and what they printed."""
    folder = tmp_path_factory.mktemp("backends")
    config = ds_json(folder / "zero2.json", **BATCH)
    bf16 = ds_json(folder / "bf16.json", **BATCH, bf16={"enabled": True})
    # Also what the first run did not set; --lr goes before the JSON's.
    params = {"lr": 0.5, "weight_decay": 0.2, "scale": 0.3}
    other = ds_json(folder / "changed.json", **BATCH | {"gradient_clipping": 0.5}, params=params)
    changed = ["--deepspeed_config", other, "--lr", "0.004", "--max_steps", "7", "--warmup_steps", "5"]
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    adamw = ds_json(folder / "adamw.json", **BATCH, optimizer=optimizer)
    adamw_clipped = ds_json(folder / "clipped.json", **BATCH | {"gradient_clipping": 0.5}, optimizer=optimizer)
    plain = ds_json(folder / "plain.json", **BATCH)
    Path(plain).write_text(
        json.dumps({k: v for k, v in json.loads(Path(plain).read_text()).items() if "clip" not in k})
    )
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
        *(job(f"{name} changed", 2, BACKENDS[name], *changed, origin=name) for name in BACKENDS),
        job("adamw", 1, "deepspeed", "--deepspeed_config", adamw),
        job("adamw changed", 1, "deepspeed", *changed, "--deepspeed_config", adamw_clipped, origin="adamw"),
        job("zero2 without clipping", 1, "deepspeed", *short[2:], "--deepspeed_config", plain),
        job("ddp without clipping", 1, "ddp", *short[2:], "--deepspeed_config", plain),
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
    assert log.count("resuming from step0000003 at step 3") == 8


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*BACKENDS, "adamw"])
def test_settings_that_are_given_apply_to_a_resumed_run(name, runs):
    """And what changed is said. The schedule is the new one from the first step on: it warms up over 5 steps."""
    folder, log = runs
    found = rows(folder / f"{name} changed")
    assert [row["lr"] for row in found[4:7]] == pytest.approx([0.004 * 4 / 5, 0.004, 0.004], rel=1e-3)
    assert found[4]["loss"] == pytest.approx(rows(folder / name)[4]["loss"], rel=1e-5)  # of the weights that were saved
    assert found[5]["loss"] != pytest.approx(rows(folder / name)[5]["loss"], rel=1e-5)
    schedule = "max_steps 6 -> 7, warmup_steps 2 -> 5, gradient_clipping 1 -> 0.5"
    lines = [line for line in log.splitlines() if line.startswith("changed ")]
    assert len(lines) == 4 and all(schedule in line for line in lines)
    ours = "changed    weight_decay 0 -> 0.2, scale 0.1 -> 0.3, lr 0.01 -> 0.004, " + schedule
    assert lines == [ours] * 3 + ["changed    lr 0.01 -> 0.004, " + schedule]
    if name in ("fsdp2", "ddp"):
        for a, b in zip(rows(folder / "zero2 changed")[4:], found[4:], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]


@pytest.mark.timeout(600)
def test_a_run_of_deepspeeds_own_adamw_is_whole_to_inspect(runs, capsys):
    """Its files are sealed like ours; what is in them is not looked into."""
    path = runs[0] / "adamw"
    assert cli.main(["inspect", str(path)]) == 0
    assert "DeepSpeed's own" in capsys.readouterr().out
    assert cli.main(["inspect", str(path / "checkpoints" / "step0000006")]) == 0
    assert "step0000006: whole\n  step           6, files are DeepSpeed's own" in capsys.readouterr().out
    assert cli.main(["consolidate", str(path), str(path / "model")]) == 2
    assert "has no checkpoint.json: it is not whole, or no optimizer of lorapre_dist" in capsys.readouterr().err


@pytest.mark.timeout(600)
def test_the_default_of_clipping_is_deepspeeds_under_every_backend(runs):
    """The first gradient is larger, so that a step without clipping is another one."""
    folder, log = runs
    zero2, ddp = (rows(folder / f"{name} without clipping") for name in ("zero2", "ddp"))
    assert zero2[1]["grad_norm"] > 1.5
    assert ddp[1]["eval_loss"] == pytest.approx(zero2[1]["eval_loss"], rel=1e-5)
    assert log.count("clipping   gradients at norm 1 (DeepSpeed's default)") == 2
    assert log.count("clipping   gradients at norm 0.5\n") == 4


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
