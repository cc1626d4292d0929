"""Examples and problems for fine-tuning: columns, masks, cuts, and the same batches for any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.tokenizer import train_bpe
from lorapre_dist.training.engines.engines import summary
from lorapre_dist.training.finetune.app import with_steps
from lorapre_dist.training.finetune.data import FinetuneData, prepare_data
from lorapre_dist.training.finetune.examples import IGNORED, ExampleStream
from lorapre_dist.training.finetune.scoring import generate
from lorapre_dist.training.finetune.settings import ALPACA, FinetuneSettings, load_settings

METAMATH = [
    {"query": f"What is {i} plus one?", "response": f"{i} + 1 = {i + 1}.\nThe answer is: {i + 1}", "type": "GSM_AnsAug"}
    for i in range(40)
]
GSM8K = [
    {"question": f"{i} apples and one more?", "answer": f"{i}+1=<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(9)
]
MATH = [{"problem": "Halve $x$.", "solution": "It is $\\boxed{\\frac{x}{2}}$.", "answer": "\\frac{x}{2}", "level": 2}]
WHOLE = BatchPlan(8, 2, 1, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as far as data needs it: config and tokenizer."""
    path = tmp_path_factory.mktemp("model")
    texts = [ALPACA, *(text for row in METAMATH for text in row.values())]
    train_bpe(texts, 400).save_pretrained(path)
    LlamaConfig(vocab_size=400).save_pretrained(path)
    return path


@pytest.fixture
def prepare(model: Path, tmp_path: Path, cache: Path) -> Callable[..., FinetuneData]:
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_batch_size": 8, "optimizer": {"type": "LoRAPre", "params": {"rank": 8}}})
    )
    fixed = ["--model", str(model), "--deepspeed_config", str(tmp_path / "ds.json"), "--data_cache", str(cache)]

    def settings(*options: str) -> FinetuneSettings:
        return load_settings([*fixed, *options], 1)

    def make(*options: str, plan: BatchPlan = WHOLE) -> FinetuneData:
        return prepare_data(settings(*options), plan)

    make.settings = settings  # type: ignore[attr-defined]
    return make


def write(path: Path, rows: list[dict[str, Any]], lines: bool = True) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return str(path)


def decoded(data: FinetuneData, index: int) -> tuple[str, str]:
    """Prompt and learnt part of an example."""
    tokens, prompt = data.train.examples.example(index)
    return data.tokenizer.decode(tokens[:prompt]), data.tokenizer.decode(tokens[prompt:])


@pytest.mark.parametrize(
    ("rows", "query", "response"),
    [(METAMATH, "query", "response"), (GSM8K, "question", "answer"), (MATH, "problem", "solution")],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_the_prompt_is_the_templates_and_the_response_ends(rows, query, response, suffix, prepare, tmp_path):
    data = prepare("--dataset", write(tmp_path / f"x.{suffix}", rows, suffix == "jsonl"))
    assert data.examples == len(rows)
    assert ALPACA.endswith("### Instruction:\n{query}\n\n### Response:")
    for index, row in enumerate(rows):
        end = data.tokenizer.eos_token
        assert decoded(data, index) == (ALPACA.replace("{query}", row[query]), row[response] + end)


def test_only_responses_are_learnt(prepare, tmp_path):
    data = prepare("--dataset", write(tmp_path / "x.jsonl", METAMATH), "--prompt_template", "Q: {query}\\nA: ")
    batch = data.train.next_batch()
    assert len(batch.micro_batches) == 4
    learnt = tokens = 0
    for micro in batch.micro_batches:
        assert micro["input_ids"].shape == micro["labels"].shape
        for inputs, labels in zip(micro["input_ids"], micro["labels"], strict=True):
            kept = labels != IGNORED
            assert torch.equal(inputs[kept], labels[kept])
            text = data.tokenizer.decode(labels[kept])
            assert text.endswith("<|endoftext|>")
            assert "The answer is: " in text
            first = int(kept.nonzero()[0])
            question = data.tokenizer.decode(inputs[:first])
            assert question.startswith("Q: What is ")
            assert question.endswith("plus one?\nA: ")
            learnt += int(kept.sum())
            tokens += first + int(kept.sum())
    assert (batch.learnt, batch.tokens) == (learnt, tokens)


def test_long_responses_are_cut_and_long_prompts_dropped(prepare, tmp_path):
    rows = [
        {"query": "short?", "response": "yes " * 200},
        {"query": "why " * 200, "response": "no"},
        {"query": "short?", "response": "yes"},
    ]
    options = ["--dataset", write(tmp_path / "x.jsonl", rows), "--prompt_template", "{query}\\n", "--seq_len", "20"]
    data = prepare(*options)
    assert (data.examples, data.dropped) == (2, 1)
    cut, whole = (data.train.examples.example(k)[0] for k in (0, 1))
    assert len(cut) == 20
    assert cut[-1] != data.tokenizer.eos_token_id  # the response did not end there
    assert whole[-1] == data.tokenizer.eos_token_id
    with pytest.raises(ConfigError, match=r"--seq_len 8: the question alone is longer in all 1 examples"):
        prepare("--dataset", write(tmp_path / "y.jsonl", rows[1:2]), "--seq_len", "8")


def rows_of(batch: Any) -> list[list[int]]:
    """Examples of a rank's part of a batch, without padding."""
    pairs = [pair for micro in batch.micro_batches for pair in zip(micro["input_ids"], micro["labels"], strict=True)]
    return [inputs[: int((labels != IGNORED).nonzero()[-1]) + 1].tolist() for inputs, labels in pairs]


def test_batches_are_the_same_for_any_number_of_ranks(prepare, tmp_path):
    data = prepare("--dataset", write(tmp_path / "x.jsonl", METAMATH))
    examples = data.train.examples

    def stream(world: int, rank: int, seed: int = 0) -> ExampleStream:
        return ExampleStream(examples, BatchPlan(8, 2, world, rank), seed)

    alone, four, other = stream(1, 0), [stream(4, rank) for rank in range(4)], stream(1, 0, seed=1)
    seen: list[list[int]] = []
    for _ in range(10):  # two epochs of 40 examples
        batch, parts = alone.next_batch(), [s.next_batch() for s in four]
        assert rows_of(batch) == [row for part in parts for row in rows_of(part)]
        assert {(part.tokens, part.learnt) for part in parts} == {(batch.tokens, batch.learnt)}
        seen += rows_of(batch)
    first, second = seen[:40], seen[40:]
    assert sorted(first) == sorted(second)
    assert len({tuple(row) for row in first}) == 40
    assert first != second
    assert rows_of(other.next_batch()) != first[:8]

    resumed = stream(2, 1)
    resumed.load_state_dict(four[0].state_dict() | {"position": 24})
    assert rows_of(resumed.next_batch()) == seen[28:32]
    with pytest.raises(ConfigError, match="tokens"):
        resumed.load_state_dict({"kind": "tokens", "position": 0})


def test_a_random_choice_of_examples(prepare, tmp_path):
    path = write(tmp_path / "x.jsonl", METAMATH)
    chosen = prepare("--dataset", path, "--max_examples", "16").train.chosen
    assert len(set(chosen.tolist())) == 16
    assert not np.array_equal(chosen, np.arange(16))
    assert np.array_equal(chosen, prepare("--dataset", path, "--max_examples", "16").train.chosen)
    assert not np.array_equal(chosen, prepare("--dataset", path, "--max_examples", "16", "--seed", "1").train.chosen)
    assert len(prepare("--dataset", path, "--max_examples", "100").train.chosen) == 40


def test_epochs_become_steps(prepare, tmp_path):
    path = write(tmp_path / "x.jsonl", METAMATH)
    for options, steps, warmup in (
        ([], 5, 1),
        (["--epochs", "2.5"], 13, 1),
        (["--max_steps", "100"], 100, 3),
        (["--epochs", "3", "--warmup_steps", "0"], 15, 0),
    ):
        settings = prepare.settings("--dataset", path, *options)
        settings = with_steps(settings, prepare("--dataset", path, *options))
        assert (settings.max_steps, settings.warmup_steps) == (steps, warmup)


def test_problems_of_both_forms(prepare, tmp_path):
    files = [write(tmp_path / "gsm8k.jsonl", GSM8K), write(tmp_path / "math-500.jsonl", MATH)]
    data = prepare("--max_steps", "0", "--score", *files, "--score_problems", "4")
    assert {name: [p.answer for p in found] for name, found in data.problems.items()} == {
        "gsm8k": ["1", "2", "3", "4"],
        "math500": ["\\frac{x}{2}"],
    }
    problem = data.problems["gsm8k"][2]
    assert data.tokenizer.decode(problem.prompt) == ALPACA.replace("{query}", "2 apples and one more?")


class Engine:
    """As much of an engine as generation needs."""

    def __init__(self, module: LlamaForCausalLM) -> None:
        self.module, self.device = module, torch.device("cpu")
        self.eval, self.train = module.eval, module.train


def test_batched_generation_is_that_of_each_prompt_alone(prepare, model):
    """Left padding changes nothing, responses come back in order and end at the end of the sequence."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape))
    for parameter in llama.parameters():  # far from the ties of a fresh model
        parameter.data.mul_(4.0)
    # As a chat model asks for it; scoring is greedy all the same.
    llama.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"] for text in ("What is", "a", "What is 5 plus one? The answer", "plus " * 9)]
    options = {"max_new_tokens": 12, "synced": False}
    alone = [generate(Engine(llama), tokenizer, [p], batch=1, **options)[0] for p in prompts]
    assert generate(Engine(llama), tokenizer, prompts, batch=3, **options) == alone
    assert len(set(alone)) == 4
    assert llama.training

    text = next(text for text in alone if text.isascii())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[5]
    ended = generate(Engine(llama), tokenizer, prompts, batch=4, **options)
    assert ended == [text.split(tokenizer.eos_token)[0] for text in alone]
    assert ended != alone


def test_a_run_that_is_not_scored_has_a_summary_too():
    writer = SimpleNamespace(rows=[{"step": 0, "loss": None}, {"step": 1, "loss": 2.0}])
    engine = SimpleNamespace(basic_optimizer=None)
    trainer = SimpleNamespace(engine=engine, writer=writer, step=1, tokens=9, settings=SimpleNamespace(output_dir="x"))
    assert summary(trainer)["steps"] == 1
    writer.rows += [{"step": 2, "loss": 1.0, "eval_a_exact_match": 0.5}, {"step": 3, "eval_a_exact_match": 0.75}]
    found = summary(trainer)
    assert (found["eval_a_exact_match_before"], found["eval_a_exact_match_after"]) == (0.5, 0.75)
