"""Real two-rank runs: what is written, that a killed run continues as if nothing had happened, and clean ends."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch.conftest import ds_json, finish, group_members, kill, launch, wait_for

STEPS = ["--max_steps", "12", "--warmup_steps", "3", "--eval_every", "4", "--save_every", "4"]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Metrics without the one column that measures time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two loaded checkpoints differ in the slightest."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where} keys"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where} length"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}[{i}]")]
    if isinstance(a, (int, float, str, bool, type(None))):
        return [] if a == b else [where]
    return []


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_and_resumed_is_bit_identical(stage, module_path, base_options):
    config = ds_json(module_path / f"zero{stage}.json", zero_optimization={"stage": stage})
    whole, killed = module_path / f"whole{stage}", module_path / f"killed{stage}"
    options = [*base_options, *STEPS, "--deepspeed_config", config, "--output_dir"]

    process = launch(2, *options, str(whole))
    code, out, err = finish(process)
    assert code == 0, err
    assert "resuming" not in out
    assert group_members(process.pid) == []

    process = launch(2, *options, str(killed))
    metrics = killed / "metrics.jsonl"
    # After the first checkpoint, so that the next row (step 6 of 0..12) is one that the resumed run writes again.
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 7, 120, process)
    kill(process)
    process.communicate()
    assert (killed / "checkpoints" / "latest").read_text() == "step0000004"

    process = launch(2, *options, str(killed))
    code, out, err = finish(process)
    assert code == 0, err
    assert "resuming from step0000004 at step 4" in out
    assert group_members(process.pid) == []

    assert rows(killed) == rows(whole)
    assert [row["step"] for row in rows(whole)] == list(range(13))
    files = sorted(p.name for p in (whole / "checkpoints" / "step0000012").glob("*.pt"))
    assert len(files) >= 3
    for name in files:
        a, b = (torch.load(f / "checkpoints" / "step0000012" / name, weights_only=False) for f in (whole, killed))
        assert differences(a, b) == [], name


def test_what_a_run_writes(module_path, base_options):
    """Looks at the run above, or makes a short one of its own."""
    folder = module_path / "whole2"
    if not folder.exists():
        config = ds_json(module_path / "zero2.json")
        options = [*base_options, *STEPS, "--deepspeed_config", config, "--output_dir", str(folder)]
        assert finish(launch(2, *options))[0] == 0
    found = rows(folder)
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
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["eval_loss_after"] == found[-1]["eval_loss"]
    assert 0 < summary["optimizer_state_bytes"] < summary["adamw_state_bytes"]


@pytest.mark.timeout(300)
def test_one_rank_gives_the_same_losses_as_two(module_path, base_options):
    """The global batches and the initial weights do not depend on the number of ranks."""
    reference = module_path / "whole2"
    if not reference.exists():
        pytest.skip("needs the two-rank run")
    config = ds_json(module_path / "one.json", zero_optimization={"stage": 0})
    folder = module_path / "one"
    code, _, err = finish(launch(1, *base_options, *STEPS, "--deepspeed_config", config, "--output_dir", str(folder)))
    assert code == 0, err
    for a, b in zip(rows(reference), rows(folder), strict=True):
        assert a.keys() == b.keys()
        # fp32 sums in another order, over 12 steps of training.
        for name, tolerance in (("loss", 1e-4), ("eval_loss", 1e-4), ("grad_norm", 1e-2)):
            if a.get(name) is not None:
                assert a[name] == pytest.approx(b[name], rel=tolerance), (name, a["step"])
    assert rows(reference)[0]["eval_loss"] == pytest.approx(rows(folder)[0]["eval_loss"], rel=1e-6)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "damage", "words"),
    [
        (2, flip_a_byte, "is corrupt: zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        (2, truncate, "is corrupt: zero_pp_rank_1_mp_rank_00_optim_states.pt has"),
        (1, None, "its world_size is 2, this run's is 1"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(ranks, damage, words, module_path, base_options, tmp_path):
    if not (module_path / "whole2").exists():
        pytest.skip("needs the two-rank run")
    folder = tmp_path / "run"
    shutil.copytree(module_path / "whole2", folder)
    if damage:
        damage(folder / "checkpoints" / "step0000008" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    before = (folder / "metrics.jsonl").read_bytes()
    options = ["--deepspeed_config", str(module_path / "zero2.json"), "--output_dir", str(folder)]
    process = launch(ranks, *base_options, *STEPS, *options, "--resume", "step0000008")
    code, _, err = finish(process, timeout=120)
    ours = [line for line in err.splitlines() if line.startswith("error")]
    assert (code, len(ours)) == (2, 1), err
    assert words in ours[0]
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert group_members(process.pid) == []


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
