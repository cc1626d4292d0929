"""Corpora that are tokenised as a whole: cached token files, and an exactly resumable stream of sequences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.cache_files import build_once
from lorapre_dist.training.data.order import Permutation

ENCODE_BATCH = 256

Encode = Callable[[list[str]], list[list[int]]]


def token_file(
    folder: Path, texts: Callable[[], Iterable[str]], encode: Encode, limit: int | None = None
) -> np.ndarray:
    """Token ids of ``texts()``, one flat array mapped from a file that one process writes once.

    Args:
        folder: cache entry; its name must change with the texts and the tokenizer.
        texts: starts a pass over the documents.
        encode: documents to token ids.
        limit: stop after this many tokens.
    """

    def build(temporary: Path) -> None:
        count = 0
        with open(temporary / "tokens.bin", "wb") as file:
            for ids in encoded(texts(), encode):
                ids = ids if limit is None else ids[: limit - count]
                np.asarray(ids, dtype=np.uint32).tofile(file)
                count += len(ids)
                if limit is not None and count >= limit:
                    break
        (temporary / "meta.json").write_text(json.dumps({"tokens": count}))

    build_once(folder, build)
    count = json.loads((folder / "meta.json").read_text())["tokens"]
    if count == 0:
        return np.zeros(0, dtype=np.uint32)
    return np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r", shape=(count,))


def encoded(texts: Iterable[str], encode: Encode) -> Iterator[list[int]]:
    """Token ids of each document, encoded some hundred at a time."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == ENCODE_BATCH:
            yield from encode(batch)
            batch = []
    if batch:
        yield from encode(batch)


class Tokens(Protocol):
    """A flat array of token ids, or what can be cut like one."""

    def __len__(self) -> int:
        """Number of tokens."""

    def __getitem__(self, place: slice) -> np.ndarray:
        """Tokens at a slice of step 1."""


class TokenStream:
    """Sequences of a token array, shuffled anew each epoch; sequence ``i`` is the same for any world size.

    The array, repeated endlessly, is cut into sequences; those that begin in one epoch are permuted. So every token
    is used once an epoch, the last ones (less than a sequence) with the first of the next.
    """

    def __init__(self, tokens: Tokens, seq_len: int, plan: BatchPlan, seed: int) -> None:
        self.blocks = len(tokens) // seq_len
        if self.blocks < plan.global_batch:
            raise ConfigError(
                f"the corpus is too small: {len(tokens)} training tokens make {self.blocks} sequences of {seq_len}, "
                f"one batch needs {plan.global_batch}"
            )
        self.tokens, self.seq_len = tokens, seq_len
        self.plan = plan
        self.seed = seed
        self.position = 0
        self._epoch = -1
        self._order = Permutation(0, [seed])

    def next_batch(self) -> torch.Tensor:
        """This rank's sequences of the next global batch, ``(per_rank, seq_len)``, int64."""
        first = self.position + self.plan.first
        rows = [self._sequence(self._shuffled(first + i)) for i in range(self.plan.per_rank)]
        self.position += self.plan.global_batch
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _shuffled(self, sequence: int) -> int:
        """The place in the endless array, in sequences, of what comes at ``sequence``."""
        epoch = ((sequence + 1) * self.seq_len - 1) // len(self.tokens)
        start, stop = (e * len(self.tokens) // self.seq_len for e in (epoch, epoch + 1))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = Permutation(stop - start, [self.seed, epoch])
        return start + int(self._order[np.array([sequence - start])][0])

    def _sequence(self, place: int) -> np.ndarray:
        start = place * self.seq_len % len(self.tokens)
        cut = self.tokens[start : start + self.seq_len]
        return cut if len(cut) == self.seq_len else np.concatenate([cut, self.tokens[: self.seq_len - len(cut)]])

    def state_dict(self) -> dict[str, Any]:
        """The position, in sequences over all ranks; the same on every rank."""
        return {"kind": "tokens", "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``'s position."""
        if state.get("kind") != "tokens":
            raise ConfigError(
                f"the checkpoint's data position is of kind {state.get('kind')!r}, this run's is 'tokens'"
            )
        self.position = int(state["position"])
