"""Tokenised examples: cached arrays, and an exactly resumable stream of batches in which responses alone are learnt.

An example is prompt, response and end-of-sequence token. A response that does not fit is cut at its end, and then no
end of sequence is learnt; a prompt is never cut: where no room is left for the response, the example is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan

# A label that no loss counts, as in torch and transformers.
IGNORED = -100
ENCODE_BATCH = 1024


@dataclass(frozen=True)
class Examples:
    """Tokenised examples one behind the other.

    Attributes:
        tokens: of all examples, flat.
        ends: where each example ends in ``tokens``, ``(n,)``.
        prompts: length of each prompt in tokens, ``(n,)``.
        dropped: examples that were left out, because the prompt alone is too long.
    """

    tokens: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray
    dropped: int = 0

    @classmethod
    def empty(cls) -> Examples:
        """No example at all."""
        return cls(*(np.zeros(0, dtype=np.int64) for _ in range(3)))

    @classmethod
    def read(cls, folder: Path) -> Examples:
        """What :func:`write_examples` wrote; the tokens stay in the file until they are used."""
        tokens, ends, prompts = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("tokens", "ends", "prompts"))
        return cls(tokens, np.asarray(ends), np.asarray(prompts), int((folder / "dropped").read_text()))

    def __len__(self) -> int:
        return len(self.ends)

    def example(self, index: int) -> tuple[np.ndarray, int]:
        """Tokens of one example, and the length of its prompt."""
        begin = self.ends[index - 1] if index else 0
        return self.tokens[begin : self.ends[index]], int(self.prompts[index])

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each example in ``indices``."""
        begins = np.where(indices > 0, self.ends[indices - 1], 0)
        return self.ends[indices] - begins


def write_examples(
    folder: Path, pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> None:
    """Tokenise (prompt, response) pairs into the files that :meth:`Examples.read` reads."""
    parts: list[np.ndarray] = []
    lengths, prompts, dropped = [], [], 0
    pairs = iter(pairs)
    while batch := list(islice(pairs, ENCODE_BATCH)):
        # Apart from each other, so that a prompt has the same tokens here and when it is answered.
        asked = tokenizer([prompt for prompt, _ in batch])["input_ids"]
        answered = tokenizer([response for _, response in batch], add_special_tokens=False)["input_ids"]
        for prompt, response in zip(asked, answered, strict=True):
            if len(prompt) >= seq_len:
                dropped += 1
                continue
            tokens = [*prompt, *response, tokenizer.eos_token_id][:seq_len]
            parts.append(np.asarray(tokens, dtype=np.uint32))
            lengths.append(len(tokens))
            prompts.append(len(prompt))
    np.save(folder / "tokens.npy", np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32))
    np.save(folder / "ends.npy", np.cumsum(np.asarray(lengths, dtype=np.int64)))
    np.save(folder / "prompts.npy", np.asarray(prompts, dtype=np.int64))
    (folder / "dropped").write_text(str(dropped))


@dataclass(frozen=True)
class ExampleBatch:
    """This rank's part of a global batch.

    Attributes:
        micro_batches: ``input_ids`` and ``labels``, ``(micro_batch, longest)`` int64 each. Padding stands behind the
            examples, where no token that counts can see it, so no attention mask is needed.
        tokens: of the examples of all ranks.
        learnt: those of them that a loss is taken of.
    """

    micro_batches: list[dict[str, torch.Tensor]]
    tokens: int
    learnt: int


class ExampleStream:
    """Examples in an order shuffled anew each epoch; global batch ``t`` holds the same ones for any world size.

    With ``limit``, so many examples are chosen at random, once for all epochs, by ``seed`` alone.
    """

    def __init__(self, examples: Examples, plan: BatchPlan, seed: int, limit: int | None = None) -> None:
        self.examples, self.plan, self.seed = examples, plan, seed
        self.chosen = np.arange(len(examples))
        if limit is not None and limit < len(examples):
            self.chosen = np.sort(np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:limit])
        self.position = 0
        self._epoch = -1
        self._order = self.chosen

    def next_batch(self) -> ExampleBatch:
        """This rank's part of the next global batch, and the sizes of all of it."""
        indices = np.asarray([self._example(self.position + i) for i in range(self.plan.global_batch)])
        self.position += self.plan.global_batch
        lengths, prompts = self.examples.lengths(indices), self.examples.prompts[indices]
        own = indices[self.plan.first : self.plan.first + self.plan.per_rank]
        micro = self.plan.micro_batch
        batches = [self._padded(own[i : i + micro]) for i in range(0, len(own), micro)]
        # The first token of an example has nothing before it to be predicted from.
        return ExampleBatch(batches, int(lengths.sum()), int((lengths - np.maximum(prompts, 1)).sum()))

    def _example(self, position: int) -> int:
        epoch, index = divmod(position, len(self.chosen))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.chosen)
        return int(self._order[index])

    def _padded(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        longest = int(self.examples.lengths(indices).max())
        inputs = torch.zeros(len(indices), longest, dtype=torch.int64)
        labels = torch.full((len(indices), longest), IGNORED, dtype=torch.int64)
        for row, index in enumerate(indices):
            tokens, prompt = self.examples.example(int(index))
            inputs[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            labels[row, prompt : len(tokens)] = inputs[row, prompt : len(tokens)]
        return {"input_ids": inputs, "labels": labels}

    def state_dict(self) -> dict[str, Any]:
        """The position, in examples over all ranks; the same on every rank."""
        return {"kind": "examples", "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``'s position."""
        if state.get("kind") != "examples":
            raise ConfigError(
                f"the checkpoint's data position is of kind {state.get('kind')!r}, this run's is 'examples'"
            )
        self.position = int(state["position"])
