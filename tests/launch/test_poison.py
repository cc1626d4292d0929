"""A loss that is no number in a run that saves at every step: nothing that cannot be resumed is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorapre_dist.cli import main as lorapre
from tests.forks import Ranks
from tests.launch.conftest import ds_json
from tests.launch.poison import poison

pytestmark = pytest.mark.slow

OPTIONS = ["--max_steps", "6", "--warmup_steps", "2", "--eval_every", "0", "--save_every", "1", "--keep_last", "2"]
OPTIONS += ["--log_every", "10", "--no_tensorboard", "--no_progress"]
BACKENDS = {f"zero{stage}": ("deepspeed", stage, "LoRAPre") for stage in (0, 2)}
BACKENDS |= {"fsdp2": ("fsdp2", 2, "LoRAPre"), "ddp": ("ddp", 2, "LoRAPreLion"), "adamw": ("deepspeed", 2, "AdamW")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base_options: list[str]) -> tuple[Path, dict[str, list[int]]]:
    """Of each backend a run poisoned from its fourth step on, and the same again with one bad step, if it may have."""
    folder = tmp_path_factory.mktemp("poison")
    codes: dict[str, Any] = {}
    for name, (backend, stage, optimizer) in BACKENDS.items():
        adamw = optimizer == "AdamW"
        params = {"lr": 1e-3, "torch_adam": True} if adamw else {"lr": 0.01, "rank": 4, "max_skipped": 2}
        more = {"optimizer": {"type": optimizer, "params": params}, "zero_optimization": {"stage": stage}}
        config = ds_json(folder / f"{name}.json", train_batch_size=4, train_micro_batch_size_per_gpu=2, **more)
        argv = [*base_options, *OPTIONS, "--deepspeed_config", config, "--backend", backend]
        argv += ["--output_dir", str(folder / name)]
        for run, steps in {"all": [3, -1], "again": [] if adamw else [4]}.items():
            ended = Ranks("pretrain.py", argv, before=(poison, steps)).finish()
            codes[f"{name}-{run}"] = ended.codes
            (folder / f"{name}-{run}.log").write_text(ended.out + ended.err)
    return folder, codes


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.log").read_text()


def tags(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir() if p.is_dir())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_run_that_cannot_go_on_says_so_and_resumes(name, runs):
    """The last good checkpoint is there, whatever was kept and deleted; from it the run ends well."""
    folder, codes = runs
    log = said(folder, f"{name}-all")
    assert codes[f"{name}-all"] == [1, 1], log[-3000:]
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    wanted = (
        "the training loss is nan at step 4" if name == "adamw" else "gradients were not finite in 2 steps in a row"
    )
    assert wanted in line
    again = said(folder, f"{name}-again")
    assert codes[f"{name}-again"] == [0, 0], again[-3000:]
    assert "resuming from step0000003 at step 3" in again
    assert tags(folder / name) == ["step0000005" if name == "adamw" else "step0000004", "step0000006"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "adamw"])
def test_one_bad_step_is_skipped_and_not_saved(name, runs, capsys):
    folder, _ = runs
    log = said(folder, f"{name}-again")
    assert "warning: no checkpoint at step 5, where loss or gradient are not finite; training goes on" in log
    assert "a gradient is not finite: step skipped (1 in a row, 1 all together)" in log
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and rows[-1]["skipped_steps"] == 1 and rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert lorapre(["inspect", str(folder / name)]) == 0
    assert capsys.readouterr().out.count("whole") == 2
