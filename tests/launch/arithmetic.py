"""A generated arithmetic set in GSM8K's form, and a tiny Llama that has read sums but no questions.

    python -m tests.launch.arithmetic runs/arithmetic      # writes model/, train.jsonl and test.jsonl there

The model is pre-trained here, for some seconds, on plain text: sums of every pair of numbers, and little stories. It
knows the sums and no question, worked line or ``####``. Fine-tuning shows it questions about four fifths of the pairs;
the questions of ``test.jsonl`` are about the others.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("Tom", "Ann", "Sam", "Eve", "Max", "Ida")
THINGS = ("apples", "books", "coins", "eggs", "pens", "cups")
NUMBERS = range(1, 10)
PAIRS = [(a, b) for a in NUMBERS for b in NUMBERS]
HELD_OUT = {pair for k, pair in enumerate(random.Random(7).sample(PAIRS, len(PAIRS))) if k % 5 == 0}


def example(a: int, b: int, name: str, thing: str) -> dict[str, str]:
    """A question with its worked line and answer."""
    question = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"
    return {"question": question, "answer": f"{name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}"}


def split(held_out: bool) -> list[dict[str, str]]:
    """All questions about the pairs that are held out, or about the others; every one is different."""
    pairs = [pair for pair in PAIRS if (pair in HELD_OUT) == held_out]
    rows = [example(a, b, name, thing) for a, b in pairs for name in NAMES for thing in THINGS]
    return random.Random(3).sample(rows, len(rows))


def plain_text(chance: random.Random) -> str:
    """A line of what is read in pre-training."""
    a, b = chance.choice(PAIRS)
    name, thing = chance.choice(NAMES), chance.choice(THINGS)
    story = f"{name} has {a} {thing}, then {b} more, so now {name} has {a} + {b} = {a + b} {thing}."
    return chance.choice((f"{a} + {b} = {a + b}", f"{a}+{b}={a + b}", story))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token, as in Llama's."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for row in split(False)[:300] for text in row.values()]
    tokenizer.train_from_iterator([*texts, *(plain_text(random.Random(k)) for k in range(300))], trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def pretrain(
    tokenizer: PreTrainedTokenizerFast, steps: int = 400, batch: int = 16, length: int = 64
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    chance = random.Random(1)
    for _ in range(steps):
        rows = []
        while len(rows) < batch:
            ids: list[int] = []
            while len(ids) < length:
                ids += tokenizer(plain_text(chance) + "\n")["input_ids"]
            rows.append(ids[:length])
        tokens = torch.tensor(rows)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def write(folder: Path) -> None:
    """The model and the two files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    pretrain(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, held_out in (("train", False), ("test", True)):
        lines = [json.dumps(row) + "\n" for row in split(held_out)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
