"""Bad input: one clear line on stderr, exit code 2, before training starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lorapre_dist.training.data.tokenizer import train_bpe
from tests.forks import Ranks
from tests.launch.conftest import PRETRAIN, REPO, TINY_LLAMA, ds_json, environment
from tests.training.conftest import documents


@dataclass
class Case:
    """Options added to a good command line, changes of its JSON, and what the line must hold."""

    words: list[str]
    options: list[str] = field(default_factory=list)
    ds: dict[str, Any] | None = None
    text: str | None = None
    prepare: Callable[[Path], list[str]] | None = None
    code: int = 2

    def check(self, result: dict[str, Any]) -> None:
        """One line on stderr with all the words, and the exit code."""
        said = [line for line in result["stderr"].splitlines() if line.strip()]
        lines = [line for line in said if not line.startswith("warning: a gradient is not finite")]
        assert result["code"] == self.code, result["stderr"]
        assert len(lines) == 1, result["stderr"]
        assert lines[0].startswith("error: ")
        for word in self.words:
            assert word in lines[0]


def run_forked(jobs: list[list[str]], script: str) -> list[dict[str, Any]]:
    """Exit code and stderr of each command line of a program, without a launcher."""
    ended = [Ranks(script, argv, world_size=None).finish() for argv in jobs]
    return [{"code": one.codes[0], "stderr": one.err} for one in ended]


def file_option(option: str, name: str, content: str | bytes) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [option, str(path)]

    return prepare


def checkpoint(damage: Callable[[Path], None] | None, *options: str) -> Callable[[Path], list[str]]:
    """A run folder with a checkpoint in it, damaged."""

    def prepare(folder: Path) -> list[str]:
        tag = folder / "out" / "checkpoints" / "step0000004"
        tag.mkdir(parents=True)
        (tag.parent / "latest").write_text(tag.name)
        if damage:
            damage(tag)
        return ["--output_dir", str(folder / "out"), *options]

    return prepare


def weights(tokens: int | None, other: int | None = None, cut: bool = False) -> Callable[[Path], list[str]]:
    """A Llama's folder for ``--init_from``: perhaps with a tokenizer of so many ``tokens``, and cut safetensors.

    ``other``: size of a tokenizer of other text, which is given as ``--tokenizer``.
    """

    def prepare(folder: Path) -> list[str]:
        model, options = folder / "model", ["--init_from", str(folder / "model")]
        LlamaConfig(**TINY_LLAMA | {"vocab_size": 320}).save_pretrained(model)
        if tokens is not None:
            train_bpe(documents(20), tokens).save_pretrained(model)
        if other is not None:
            train_bpe(["quite another text, other words"] * 9, other).save_pretrained(folder / "other")
            options += ["--tokenizer", str(folder / "other")]
        if cut:
            (model / "model.safetensors").write_bytes(b"\x10\x00")
        return options

    return prepare


def write_manifest(tag: Path) -> None:
    files = {"tensors/__0_0.distcp": {"bytes": 1, "blake2b": "00"}}
    (tag / "manifest.json").write_text(json.dumps({"format": 1, "tag": tag.name, "step": 4, "files": files}))


CASES = {
    "option of the optimizer": Case(["rnak", "rank"], ds={"params": {"rnak": 4}}),
    "rank 0": Case(["rank"], ds={"params": {"rank": 0}}),
    "negative rank": Case(["rank", "-1"], ds={"params": {"rank": -1}}),
    "rank above every matrix": Case(["rank", "4096"], ds={"params": {"rank": 4096}}),
    "betas": Case(["betas"], ds={"params": {"betas": [0.9, 1.0]}}),
    "lr in the JSON": Case(["lr"], ds={"params": {"lr": -1.0}}),
    "variant": Case(["variant", "stable"], ds={"params": {"variant": "stabel"}}),
    "target_modules": Case(
        ["target_modules", "nothing_like_it"], ds={"params": {"target_modules": ["nothing_like_it"]}}
    ),
    "optimizer name": Case(
        ["LoRAPer", "did you mean LoRAPre"], ds={"optimizer": {"type": "LoRAPer", "params": {"lr": 0.1}}}
    ),
    "option of another optimizer": Case(
        ["DeepSpeed refuses", "rank"], ds={"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "rank": 3}}}
    ),
    "lr that diverges": Case(["validation loss is nan", "lower the lr"], ["--lr", "1e17", "--eval_every", "0"], code=1),
    "missing JSON": Case(["no such file", "nowhere.json"], ["--deepspeed_config", "nowhere.json"]),
    "malformed JSON": Case(["not JSON", "line 1"], prepare=file_option("--deepspeed_config", "bad.json", "{train")),
    "no batch size": Case(["train_batch_size"], ds={"train_batch_size": None, "train_micro_batch_size_per_gpu": None}),
    "batch size that does not divide": Case(
        ["train_batch_size=7", "micro batch"], ds={"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}
    ),
    "DeepSpeed's own settings": Case(["stage", "0, 1, 2"], ds={"zero_optimization": {"stage": 7}}),
    "fp16 without DeepSpeed": Case(
        ["--backend ddp", "fp16", "bf16"], ["--backend", "ddp"], ds={"fp16": {"enabled": True}}
    ),
    "AdamW without DeepSpeed": Case(
        ["--backend fsdp2", "'AdamW'", "LoRAPre"],
        ["--backend", "fsdp2"],
        ds={"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
    ),
    "option of the optimizer without DeepSpeed": Case(
        ["rnak", "rank"], ["--backend", "ddp"], ds={"params": {"rnak": 4}}
    ),
    "rank above every matrix without DeepSpeed": Case(
        ["rank", "4096"], ["--backend", "fsdp2"], ds={"params": {"rank": 4096}}
    ),
    "clipping without DeepSpeed": Case(
        ["gradient_clipping='1.0'", "number"], ["--backend", "ddp"], ds={"gradient_clipping": "1.0"}
    ),
    "unknown backend": Case(["--backend", "fsdp3", "deepspeed", "fsdp2", "ddp"], ["--backend", "fsdp3"]),
    "unknown preset": Case(["llama-tiny", "did you mean"], ["--model", "llama-tinny"]),
    "hub model that cannot be had": Case(
        ["--model no-such-owner/no-such-model: cannot be loaded", "hub name"],
        ["--model", "no-such-owner/no-such-model"],
    ),
    "folder without a model": Case(["--model", "holds no config.json"], ["--model", str(REPO / "launch")]),
    "model that sees": Case(
        ["--model", "llava is no causal LM"], prepare=file_option("--model", "m.json", '{"model_type": "llava"}')
    ),
    "two models": Case(["--model or --init_from, not both"], ["--init_from", "x/y", "--model", "llama-tiny"]),
    "weights that are not there": Case(["--init_from ./gone: no such folder"], ["--init_from", "./gone"]),
    "weights without a tokenizer": Case(["holds no tokenizer", "--tokenizer"], prepare=weights(tokens=None)),
    "weights of another tokenizer": Case(
        ["--init_from", "tokens of the tokenizer in use have other ids", "leave --tokenizer out"],
        prepare=weights(tokens=300, other=300),
    ),
    "tokenizer larger than the model": Case(
        ["--init_from", "vocab_size 320 is less than the tokenizer's 330 tokens"], prepare=weights(tokens=330)
    ),
    "folder without weights": Case(["--init_from", "cannot be loaded"], prepare=weights(tokens=300)),
    "folder without weights, FSDP2": Case(
        ["--init_from", "model.safetensors is not there"], ["--backend", "fsdp2"], prepare=weights(tokens=300)
    ),
    "cut weights": Case(["--init_from", "cannot be loaded"], prepare=weights(tokens=300, cut=True)),
    "cut weights, FSDP2": Case(
        ["--init_from", "cannot be loaded"], ["--backend", "fsdp2"], prepare=weights(tokens=300, cut=True)
    ),
    "unknown option": Case(["--max_stepps", "did you mean --max_steps"], ["--max_stepps", "3"]),
    "max_steps": Case(["--max_steps 0"], ["--max_steps", "0"]),
    "missing dataset": Case(["no such file", "gone.jsonl"], ["--dataset", "gone.jsonl"]),
    "missing folder": Case(["no such file or folder"], ["--dataset", "/nowhere/at/all"]),
    "empty corpus": Case(["empty.jsonl", "is empty"], prepare=file_option("--dataset", "empty.jsonl", "")),
    "empty text": Case(
        ["blank.jsonl", "holds no text"], prepare=file_option("--dataset", "blank.jsonl", '{"text": ""}\n')
    ),
    "torn JSON lines": Case(
        ["torn.jsonl", "cannot be read"], prepare=file_option("--dataset", "torn.jsonl", '{"text": "a"}\n{"te')
    ),
    "unreadable parquet": Case(
        ["bad.parquet", "cannot be"], prepare=file_option("--dataset", "bad.parquet", b"PAR0 no")
    ),
    "small corpus": Case(
        ["too small"],
        prepare=file_option("--dataset", "small.jsonl", '{"text": "just a few words"}\n{"text": "more"}\n'),
    ),
    "column": Case(["--text_column body", "text"], ["--text_column", "body"]),
    "hub name that cannot be had": Case(
        ["no-such-owner/no-such-set", "cannot be opened"], ["--dataset", "no-such-owner/no-such-set"]
    ),
    "missing tokenizer": Case(["--tokenizer ./none"], ["--tokenizer", "./none"]),
    "folder without tokenizer": Case(["--tokenizer", "cannot be loaded"], ["--tokenizer", str(REPO / "launch")]),
    "model config": Case(
        ["--model_config", "model_type"], ["--max_steps", "2"], prepare=file_option("--model_config", "m.json", "{}")
    ),
    "output_dir is a file": Case(["--output_dir", "is a file"], ["--output_dir", str(PRETRAIN)]),
    "resume tag": Case(["--resume step9", "none"], ["--resume", "step9"]),
    "checkpoint without manifest": Case(["cannot resume", "has no manifest.json"], prepare=checkpoint(None)),
    "garbled manifest": Case(
        ["manifest.json cannot be read"],
        prepare=checkpoint(lambda tag: (tag / "manifest.json").write_text('{"format": 1')),
    ),
    "checkpoint without a file": Case(["step0000004 is damaged", "is missing"], prepare=checkpoint(write_manifest)),
    "latest that points nowhere": Case(
        ["other has no manifest.json"], prepare=checkpoint(lambda tag: tag.rename(tag.with_name("other")))
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, base_options: list[str]) -> dict[str, dict[str, Any]]:
    """Every case run, each in a process of its own, forked from one that has imported everything."""
    folder = tmp_path_factory.mktemp("bad")
    jobs = []
    for number, case in enumerate(CASES.values()):
        own = folder / str(number)
        own.mkdir()
        config = ds_json(own / "ds.json", **(case.ds or {}))
        given = ["--deepspeed_config", config, "--output_dir", str(own / "out"), "--max_steps", "2"]
        extra = case.prepare(own) if case.prepare else []
        jobs.append([*base_options, *given, *case.options, *extra])
    return dict(zip(CASES, run_forked(jobs, "pretrain.py"), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", CASES)
def test_one_line_and_its_exit_code(name, results):
    CASES[name].check(results[name])


@pytest.mark.slow
def test_the_program_itself_exits_with_2(tmp_path):
    """As a user would run it, without a launcher."""
    command = [sys.executable, str(PRETRAIN), "--deepspeed_config", "nowhere.json"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --deepspeed_config nowhere.json: no such file"
    assert list(tmp_path.iterdir()) == []
