"""Two-rank runs: what is written, that a killed one continues as if nothing had happened, and clean ends."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorapre_dist.checkpoint import dcp
from tests.forks import Ranks
from tests.launch.conftest import ds_json, finish, group_members, launch

pytestmark = pytest.mark.slow

STEPS = ["--max_steps", "12", "--warmup_steps", "3", "--eval_every", "4", "--save_every", "4"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics without the one column that measures time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(module_path, base_options) -> Path:
    """The folder of a run on two ranks under ZeRO-3 that nothing interrupted."""
    config = ds_json(module_path / "zero3.json", zero_optimization={"stage": 3})
    folder = module_path / "whole"
    options = [*base_options, *STEPS, "--deepspeed_config", config, "--output_dir", str(folder)]
    codes, out, err = Ranks("pretrain.py", options).finish()
    assert codes == [0, 0], err
    assert "resuming" not in out
    return folder


@pytest.mark.timeout(600)
def test_killed_and_resumed_is_bit_identical(whole, module_path, base_options):
    killed = module_path / "killed"
    options = [*base_options, *STEPS, "--deepspeed_config", str(module_path / "zero3.json"), "--output_dir"]

    ranks = Ranks("pretrain.py", [*options, str(killed)])
    metrics = killed / "metrics.jsonl"
    # After the first checkpoint, so that the next row (step 6 of 0..12) is one that the resumed run writes again.
    ranks.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 7)
    ranks.kill()
    assert (killed / "checkpoints" / "latest").read_text() == "step0000004"

    codes, out, err = Ranks("pretrain.py", [*options, str(killed)]).finish()
    assert codes == [0, 0], err
    assert "resuming from step0000004 at step 4" in out

    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(whole)] == list(range(13))
    tensors = [f / "checkpoints" / "step0000012" / "tensors" for f in (whole, killed)]
    entries = dcp.shapes(tensors[0])
    assert entries.keys() == dcp.shapes(tensors[1]).keys()
    for name, entry in entries.items():
        assert torch.equal(*(dcp.whole(folder, name, entry) for folder in tensors)), name


@pytest.mark.timeout(300)
def test_what_a_run_writes(whole):
    found = rows(whole)
    assert found[0]["step"] == 0
    assert found[0]["eval_loss"] == pytest.approx(math.log(400), abs=0.3)
    assert [row["step"] for row in found if "eval_loss" in row] == [0, 4, 8, 12]
    assert found[-1]["eval_loss"] < found[0]["eval_loss"] - 0.3
    for row in found[1:]:
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
        assert row["tokens"] == row["step"] * 8 * 32
        if "eval_loss" in row:
            assert row["eval_ppl"] == pytest.approx(math.exp(row["eval_loss"]))
    # Peak 0.01: a third after the first of three warm-up steps.
    assert found[1]["lr"] == pytest.approx(0.01 / 3)
    assert found[3]["lr"] == pytest.approx(0.01)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((whole / "tensorboard").glob("events*"))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["eval_loss_after"] == found[-1]["eval_loss"]
    assert 0 < summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]


def assert_alike(reference: Path, folder: Path) -> None:
    """The same losses but for fp32 sums in another order, over 12 steps of training."""
    for a, b in zip(rows(reference), rows(folder), strict=True):
        assert a.keys() == b.keys()
        for name, tolerance in (("loss", 1e-4), ("eval_loss", 1e-4), ("grad_norm", 1e-2)):
            if a.get(name) is not None:
                assert a[name] == pytest.approx(b[name], rel=tolerance), (name, a["step"])


@pytest.mark.timeout(300)
def test_one_rank_gives_the_same_losses_as_two(whole, module_path, base_options):
    """The global batches and the initial weights do not depend on the number of ranks."""
    config = ds_json(module_path / "one.json", zero_optimization={"stage": 0})
    folder = module_path / "one"
    options = [*base_options, *STEPS, "--deepspeed_config", config, "--output_dir", str(folder)]
    codes, _, err = Ranks("pretrain.py", options, 1).finish()
    assert codes == [0], err
    assert_alike(whole, folder)
    assert rows(whole)[0]["eval_loss"] == pytest.approx(rows(folder)[0]["eval_loss"], rel=1e-6)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.timeout(300)
def test_a_damaged_checkpoint_is_passed_over_at_another_world_size_and_stage(whole, base_options, tmp_path):
    """Two ranks under ZeRO-3 saved; the newest checkpoint is broken; one rank under ZeRO-1 goes on from the other."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    flip_a_byte(folder / "checkpoints" / "step0000012" / "tensors" / "__1_0.distcp")
    config = ds_json(tmp_path / "zero1.json", zero_optimization={"stage": 1})
    options = [*base_options, *STEPS, "--deepspeed_config", config, "--output_dir", str(folder)]

    def run(*more: str) -> tuple[int | None, str, str]:
        (code,), out, err = Ranks("pretrain.py", [*options, *more], 1).finish()
        return code, out, err

    before = (folder / "metrics.jsonl").read_bytes()
    code, _, err = run("--resume", "step0000012")
    ours = [line for line in err.splitlines() if line.startswith("error")]
    assert (code, len(ours)) == (2, 1), err
    assert "step0000012 is damaged: tensors/__1_0.distcp has a wrong checksum" in ours[0]
    assert (folder / "metrics.jsonl").read_bytes() == before

    code, _, err = run("--seed", "5")
    assert code == 2
    assert "cannot resume step0000008: its seed is 0, this run's is 5" in err

    code, out, err = run()
    assert code == 0, err
    assert "resuming from step0000008 at step 8" in out
    warnings = [line for line in err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "step0000012 is damaged: tensors/__1_0.distcp has a wrong checksum" in warnings[0]
    assert_alike(whole, folder)
    assert (folder / "checkpoints" / "latest").read_text() == "step0000012"

    code, out, err = run("--resume", "none", "--save_every", "0", "--max_steps", "3")
    assert code == 0, err
    assert "starting afresh; earlier checkpoints are now in" in out
    assert (folder / "checkpoints.1" / "latest").read_text() == "step0000012"


@pytest.mark.timeout(300)
def test_bad_input_on_two_ranks_ends_with_one_line(module_path, base_options):
    """The launcher passes our exit code on, and only rank 0 speaks."""
    config = ds_json(module_path / "bad.json", params={"rnak": 16})
    options = [
        *base_options,
        "--max_steps",
        "2",
        "--deepspeed_config",
        config,
        "--output_dir",
        str(module_path / "bad"),
    ]
    process = launch(2, *options)
    code, _, err = finish(process, timeout=120)
    assert code == 2
    assert group_members(process.pid) == []
    ours = [line for line in err.splitlines() if line.startswith("error")]
    assert len(ours) == 1
    assert "rnak" in ours[0]
    assert "rank" in ours[0]
    assert "Traceback" not in err
