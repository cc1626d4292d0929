"""Exact match: the share of problems whose generated response states the right answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lorapre_dist.checkpoint.folder import write_atomically
from lorapre_dist.core.comm import all_ranks
from lorapre_dist.training.finetune import answers
from lorapre_dist.training.finetune.data import Problem
from lorapre_dist.training.run import ranks


@dataclass(frozen=True)
class Score:
    """What came of a data set's problems.

    Attributes:
        responses: what was generated for each problem.
        extracted: the answer that each states, None where it states none.
        right: whether it is the right one.
    """

    responses: list[str]
    extracted: list[str | None]
    right: list[bool]

    @property
    def exact_match(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def answered(self) -> float:
        """Share of responses that state an answer at all."""
        return sum(found is not None for found in self.extracted) / len(self.extracted)

    def write(self, problems: Sequence[Problem], path: Path) -> None:
        """A line of JSON for each problem."""
        rows = (
            {"question": p.question, "response": text, "answer": p.answer, "extracted": found, "right": right}
            for p, text, found, right in zip(problems, self.responses, self.extracted, self.right, strict=True)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def score(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    batch: int,
    max_new_tokens: int,
    synced: bool,
) -> Score:
    """Solve all ``problems``, shared out among the ranks; a collective, the same result on every rank.

    Args:
        batch: prompts per rank that are generated together.
        synced: every forward pass is a collective (ZeRO-3): a rank that has finished goes on until all have.
    """
    texts = generate(
        engine, tokenizer, [p.prompt for p in problems], batch=batch, max_new_tokens=max_new_tokens, synced=synced
    )
    extracted = [answers.extract(text) for text in texts]
    right = [answers.equal(found, p.answer) for found, p in zip(extracted, problems, strict=True)]
    return Score(texts, extracted, right)


@torch.no_grad()
def generate(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    max_new_tokens: int,
    synced: bool,
) -> list[str]:
    """Greedy responses to ``prompts``, in their order, on every rank; arguments as in :func:`score`."""
    world = ranks.world_size()
    # Prompts of about one length lie together, and every rank gets as many of each length.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    own = order[ranks.rank() :: world]
    calls = -(-len(order[::world]) // batch)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=_padding(tokenizer),
        use_cache=True,
    )
    found: dict[int, str] = {}
    engine.eval()
    try:
        for call in range(calls):
            mine = own[call * batch : (call + 1) * batch]
            # Where forward passes are collectives a rank with nothing left takes part with any prompt.
            if mine or synced:
                rows = [prompts[i] for i in mine] or [prompts[order[-1]]]
                texts = _generate(engine, tokenizer, rows, config, synced and world > 1)
                found.update(zip(mine, texts, strict=False))
    finally:
        engine.train()
    found = {index: text for part in all_ranks(found) for index, text in part.items()}
    return [found[index] for index in range(len(prompts))]


def _generate(
    engine: Any, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], config: GenerationConfig, synced: bool
) -> list[str]:
    longest = max(len(row) for row in rows)
    # Padding in front: every response begins in the same column.
    inputs = torch.full((len(rows), longest), config.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(inputs)
    for k, row in enumerate(rows):
        inputs[k, longest - len(row) :] = torch.tensor(row)
        mask[k, longest - len(row) :] = 1
    inputs, mask = inputs.to(engine.device), mask.to(engine.device)
    made = engine.module.generate(inputs, attention_mask=mask, generation_config=config, synced_gpus=synced)
    end = tokenizer.eos_token_id
    responses = [ids[: ids.index(end)] if end in ids else ids for ids in made[:, longest:].tolist()]
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with: in front it is masked, behind the end of sequence it is dropped."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
