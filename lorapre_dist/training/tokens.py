"""Corpora that are tokenised as a whole: cached token files, and an exactly resumable stream of sequences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.training.batches import BatchPlan
from lorapre_dist.training.files import build_once

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


class TokenStream:
    """Sequences of a finite token array, shuffled anew each epoch; sequence ``i`` is the same for any world size.

    Tokens are cut into ``len(tokens) // seq_len`` blocks; the rest, less than one block, is never used.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, plan: BatchPlan, seed: int) -> None:
        self.blocks = len(tokens) // seq_len
        if self.blocks < plan.global_batch:
            raise ConfigError(
                f"the corpus is too small: {len(tokens)} training tokens make {self.blocks} sequences of {seq_len}, "
                f"one batch needs {plan.global_batch}"
            )
        self.tokens = tokens[: self.blocks * seq_len].reshape(self.blocks, seq_len)
        self.plan = plan
        self.seed = seed
        self.position = 0
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def next_batch(self) -> torch.Tensor:
        """This rank's sequences of the next global batch, ``(per_rank, seq_len)``, int64."""
        first = self.position + self.plan.first
        rows = [self.tokens[self._block(first + i)] for i in range(self.plan.per_rank)]
        self.position += self.plan.global_batch
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _block(self, sequence: int) -> int:
        epoch, index = divmod(sequence, self.blocks)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
        return int(self._order[index])

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
