"""The Hugging Face examples on two ranks: save, resume, and go on as the run that was never stopped."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorapre_dist.training.run import ranks
from tests.launch import forked_ranks
from tests.launch.conftest import REPO, environment, free_port
from tests.launch.few_documents import few_documents

TRAINER = ["--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--learning_rate", "0.01"]
TRAINER += ["--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "true"]
# Adapters under LoRAPre, which the JSON names under ZeRO-2 and the Trainer builds under ZeRO-3.
PEFT = {"peft zero2": 2, "peft zero3": 3}
ACCELERATE = ["--max_steps", "6", "--save_steps", "3", "--batch_size", "2"]
OPTIONS = {
    "trainer ddp": [],
    "trainer deepspeed": ["--deepspeed", "ds_configs/hf_zero2.json"],
    "trainer fsdp2": ["--fsdp"],
    "accelerate ddp": [],
    "accelerate deepspeed": [],
    "accelerate fsdp2": [],
}


def plugin(name: str) -> dict[str, str]:
    """What ``accelerate launch`` tells its ranks about a YAML, in its own words."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    config = str(REPO / "launch" / f"accelerate_{name}.yaml")
    args = launch_command_parser().parse_args(["--config_file", config, "--main_process_port", "0", "x.py"])
    args, defaults, _ = _validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        env = prepare_deepspeed_cmd_env(args)[1]
    else:
        env = prepare_multi_gpu_env(args)
    return {key: value for key, value in env.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def peft_json(path: Path, stage: int) -> str:
    """A DeepSpeed JSON for ``hf_peft.py``."""
    section = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": section}
    if stage == 2:
        params = {"lr": "auto", "rank": 2, "rank_v": 1, "target_modules": ["lora_A", "lora_B"]}
        config["optimizer"] = {"type": "LoRAPre", "params": params}
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: one named as in OPTIONS, and one that resumed from its third step."""
    folder = tmp_path_factory.mktemp("hf")
    jobs: list[dict[str, Any]] = []
    few = {"before": (few_documents,)}
    for name, options in OPTIONS.items():
        library, layout = name.split()
        trainer = library == "trainer"
        env = {} if trainer or layout == "ddp" else plugin(layout)
        argv = [*(TRAINER if trainer else ACCELERATE), *options, "--output_dir"]
        script = "hf_trainer.py" if trainer else "accelerate_train.py"
        jobs.append(forked_ranks.job(script, 2, [*argv, str(folder / name)], env=env, **few))
        saved = folder / name / ("checkpoint-3" if trainer else "step3")
        argv += [str(folder / f"{name} resumed"), "--resume_from_checkpoint", str(saved)]
        jobs.append(forked_ranks.job(script, 2, argv, env=env, **few))
    for name, stage in PEFT.items():
        argv = [*TRAINER, "--learning_rate", "0.3", "--deepspeed", peft_json(folder / f"{name}.json", stage)]
        argv += ["--output_dir"]
        jobs.append(forked_ranks.job("../tests/launch/hf_peft.py", 2, [*argv, str(folder / name)]))
        argv += [str(folder / f"{name} resumed"), "--resume_from_checkpoint", str(folder / name / "checkpoint-3")]
        jobs.append(forked_ranks.job("../tests/launch/hf_peft.py", 2, argv))
    forked_ranks.run(folder, jobs, environment() | {"LORAPRE_CACHE": str(folder / "cache")})
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """The log of a run, without times."""
    if (run / "metrics.jsonl").exists():
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    history = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    return [{k: row[k] for k in ("step", "loss", "grad_norm", "learning_rate")} for row in history if "loss" in row]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_saves_and_resumes(name, folder):
    whole = rows(folder / name)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.5
    resumed = rows(folder / f"{name} resumed")
    assert resumed == whole[-len(resumed) :]
    assert resumed[-3:] == whole[3:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", PEFT)
def test_adapters_save_and_resume(name, folder):
    """The Trainer asks for a load that is not strict, as frozen weights are not saved with adapters."""
    whole, resumed = rows(folder / name), rows(folder / f"{name} resumed")
    assert resumed == whole[-len(resumed) :]
    assert resumed[-3:] == whole[3:]
    saved = [f"{name}/checkpoint-3", f"{name}/checkpoint-6", f"{name} resumed/checkpoint-6"]
    third, last, last_resumed = [(folder / run / "adapter_model.safetensors").read_bytes() for run in saved]
    assert last_resumed == last != third
    path = folder / name / "checkpoint-6" / "global_step6" / "checkpoint.json"
    content = json.loads(path.read_text())
    assert content["frozen"] == "excluded"
    assert {e["kind"] for n, e in content["parameters"].items() if "lora_" in n} == {"lorapre"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.endswith("ddp")])
def test_the_layout_does_not_change_the_losses(name, folder):
    """fp32 sums in another order."""
    for a, b in zip(rows(folder / f"{name.split()[0]} ddp"), rows(folder / name), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_launch(folder, tmp_path):
    """The command of the README, on less text, in the folder of a run that was killed after its fifth step."""
    config = ["--config_file", "launch/accelerate_fsdp2.yaml", "--main_process_port", str(free_port())]
    program = ["tests/launch/few_documents.py", "accelerate_train.py"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, *program, *ACCELERATE]
    command += ["--output_dir", str(tmp_path), "--resume_from_checkpoint", str(folder / "accelerate fsdp2" / "step3")]
    whole = rows(folder / "accelerate fsdp2")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole[:5]))
    env = environment() | {"LORAPRE_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path) == whole


def example(name: str) -> Any:
    """A program of ``launch/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, REPO / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name, argv, words",
    [
        ("hf_trainer", ["--outptu_dir", "x"], "unknown option --outptu_dir: did you mean --output_dir?"),
        ("hf_trainer", ["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("hf_trainer", ["--eval_strategy", "often"], "often"),
        ("hf_trainer", ["--resume_from_checkpoint", "gone"], "--resume_from_checkpoint gone: no such folder"),
        ("hf_trainer", ["--resume_from_checkpoint", "."], "--resume_from_checkpoint .: is no checkpoint of Trainer's"),
        ("accelerate_train", ["--outptu_dir", "x"], "unknown option --outptu_dir: did you mean --output_dir?"),
        ("accelerate_train", ["--output_dir", "x", "--max_step", "3"], "--max_step"),
        ("accelerate_train", ["--output_dir", "x", "--resume_from_checkpoint", "gone"], "gone: no such folder"),
        (
            "accelerate_train",
            ["--output_dir", "x", "--resume_from_checkpoint", "."],
            "is no checkpoint of this program's",
        ),
    ],
)
def test_bad_options_of_the_examples_are_one_line(name, argv, words, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPO / "launch"))
    monkeypatch.setattr(sys, "argv", [name, *argv])
    program = example(name)
    assert ranks.one_line((lambda: program.options(argv)) if name == "hf_trainer" else program.options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


HOLDER = "import sys; from pathlib import Path; from lorapre_dist.checkpoint import lock; lock.take(Path(sys.argv[1]))"


@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_train"])
def test_one_run_of_an_example_in_a_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(REPO / "launch"))
    monkeypatch.setattr("lorapre_dist.checkpoint.lock.WAIT", 0.1)
    monkeypatch.setattr(sys, "argv", [name, "--output_dir", str(tmp_path)])
    program = example(name)
    monkeypatch.setattr(program, "end_with_launcher", lambda: None)  # the tests' own process has none
    code = f"{HOLDER}; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert ranks.one_line(program.main) == 2
        holder.stdin.close()
    assert f"another run is in it (host {socket.gethostname()}, process {holder.pid}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*step*"))
