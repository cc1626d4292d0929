"""Bad input of the fine-tuning program: one clear line on stderr, exit code 2, before training starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorapre_dist.training.data.tokenizer import train_bpe
from tests.launch.conftest import ds_json
from tests.launch.test_bad_input import Case, file_option, run_forked

pytestmark = pytest.mark.slow

PAIR = {"query": "What is 1 plus 1?", "response": "The answer is: 2"}


def rows(option: str, *found: dict[str, Any]) -> Callable[[Path], list[str]]:
    return file_option(option, "own.jsonl", "".join(json.dumps(row) + "\n" for row in found))


def model(change: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """A copy of the good model folder with something changed."""

    def prepare(folder: Path) -> list[str]:
        copy = folder / "changed"
        shutil.copytree(folder.parent / "model", copy)
        change(copy)
        return ["--model", str(copy)]

    return prepare


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_eos(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.eos_token = None
    without_tokenizer(folder)
    tokenizer.save_pretrained(folder)


def without_a_weight(folder: Path) -> None:
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CASES = {
    "missing model": Case(["--model ./gone", "no such folder"], ["--model", "./gone"]),
    "folder without model": Case(["holds no config.json"], prepare=model(lambda f: (f / "config.json").unlink())),
    "hub model that cannot be had": Case(["--model no-such/model: cannot be loaded"], ["--model", "no-such/model"]),
    "model without tokenizer": Case(["its tokenizer cannot be", "--tokenizer"], prepare=model(without_tokenizer)),
    "tokenizer without end of sequence": Case(["has no end-of-sequence token"], prepare=model(without_eos)),
    "model without weights": Case(["--model", "cannot be loaded"]),
    "model without one weight": Case(["holds no weights for model.norm.weight"], prepare=model(without_a_weight)),
    "model that is too short": Case(["max_position_embeddings 128", "--seq_len"], ["--seq_len", "129"]),
    "small vocabulary": Case(
        ["vocab_size 99", "less than the tokenizer's"], prepare=model(LlamaConfig(vocab_size=99).save_pretrained)
    ),
    "missing dataset": Case(["--dataset gone.jsonl", "no such file"], ["--dataset", "gone.jsonl"]),
    "empty dataset": Case(["own.jsonl", "is empty"], prepare=rows("--dataset")),
    "dataset without a response": Case(["holds no question"], prepare=rows("--dataset", PAIR | {"response": " "})),
    "unknown columns": Case(["columns a, b", "--query_column"], prepare=rows("--dataset", {"a": "1", "b": "2"})),
    "missing column": Case(["--response_column text", "query, response"], ["--response_column", "text"]),
    "numbers in a column": Case(
        ["column 'response' holds int", "not text"], prepare=rows("--dataset", PAIR | {"response": 3})
    ),
    "prompts that are too long": Case(
        ["--seq_len 16", "question alone is longer in all 1"],
        ["--seq_len", "16"],
        prepare=rows("--dataset", PAIR | {"query": "why " * 100}),
    ),
    "template": Case(["--prompt_template 'Q:'", "{query}"], ["--prompt_template", "Q:"]),
    "missing problems": Case(["--score gone.jsonl", "no such file"], ["--score", "gone.jsonl"]),
    "problems without ####": Case(
        ["--score", "'four'", "'#### '"], prepare=rows("--score", {"question": "2+2?", "answer": "four"})
    ),
    "problems in another form": Case(["--score", "columns q, a"], prepare=rows("--score", {"q": "2+2?", "a": "4"})),
    "empty answer": Case(["'$' to '2+2?'"], prepare=rows("--score", {"problem": "2+2?", "answer": "$"})),
    "two data sets of one name": Case(["two data sets", "'gsm8k'"], ["--score", "gsm8k", "openai/gsm8k"]),
    "scoring nothing": Case(["--max_steps 0", "--score"], ["--max_steps", "0"]),
    "unknown optimizer": Case(["lorapr", "lorapre", "adamw", "lora"], ["--optimizer", "lorapr"]),
    "another optimizer in the JSON": Case(
        ["--optimizer lorapre", "the DeepSpeed JSON has AdamW"],
        ["--optimizer", "lorapre"],
        ds={"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}},
    ),
    "option of the optimizer": Case(["rnak", "rank"], ds={"params": {"rnak": 4}}),
    "epochs": Case(["--epochs 0.0"], ["--epochs", "0"]),
    "warm-up": Case(["--warmup_steps 9", "--max_steps 2"], ["--warmup_steps", "9"]),
    "dropout": Case(["--lora_dropout 1.0"], ["--lora_dropout", "1"]),
    "unknown option": Case(["--max_exampels", "did you mean --max_examples"], ["--max_exampels", "3"]),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    train_bpe([json.dumps(PAIR)], 300).save_pretrained(folder / "model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=300, max_position_embeddings=128, **shape).save_pretrained(folder / "model")
    (folder / "good.jsonl").write_text(json.dumps(PAIR) + "\n")
    jobs = []
    for number, case in enumerate(CASES.values()):
        own = folder / str(number)
        own.mkdir()
        config = ds_json(own / "ds.json", **(case.ds or {}))
        given = ["--model", str(folder / "model"), "--dataset", str(folder / "good.jsonl"), "--max_steps", "2"]
        given += ["--deepspeed_config", config, "--output_dir", str(own / "out"), "--data_cache", str(folder / "cache")]
        extra = case.prepare(own) if case.prepare else []
        jobs.append([*given, "--seq_len", "64", "--prompt_template", "{query}", *case.options, *extra])
    return dict(zip(CASES, run_forked(jobs, "finetune.py"), strict=True))


@pytest.mark.timeout(420)
@pytest.mark.parametrize("name", CASES)
def test_one_line_and_its_exit_code(name, results):
    CASES[name].check(results[name])
