"""Orders of sequences that depend on a seed alone: a permutation by formula, and a shuffle buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# 32 MiB of indices; beyond, a permutation is computed where it is asked for.
MOST_IN_MEMORY = 2**22
ROUNDS = 6


class Permutation:
    """A random permutation of ``range(count)``, the same for the same ``seed``.

    Up to ``in_memory`` items it is drawn and kept. Beyond, it is a Feistel network over the next even power of two,
    applied again to what falls outside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002),
    so that 10^12 sequences take no memory.
    """

    def __init__(self, count: int, seed: list[int], in_memory: int = MOST_IN_MEMORY) -> None:
        self.count = count
        random = np.random.default_rng(seed)
        self._drawn = random.permutation(count) if count <= in_memory else None
        self._half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
        self._keys = random.integers(0, 2**64, size=ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The items at ``places``, int64 each."""
        if self._drawn is not None:
            return self._drawn[places]
        items = self._network(np.asarray(places, dtype=np.uint64))
        while (outside := items >= self.count).any():
            items[outside] = self._network(items[outside])
        return items.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        mask = np.uint64((1 << int(self._half)) - 1)
        left, right = values >> self._half, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << self._half) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ShuffleBuffer:
    """Sequences on their way: once it is full, each that comes in puts out a random one that is there.

    What comes out depends on ``seed`` and on what went in, and the content is part of the state.
    """

    def __init__(self, size: int, seq_len: int, seed: list[int]) -> None:
        self.seed = seed
        self._content = np.zeros((size, seq_len), dtype=np.int32)
        self._count = self._draws = 0

    def push(self, sequences: np.ndarray) -> np.ndarray:
        """Put in ``(n, seq_len)``, int32; what comes out for it, at most as many."""
        room = min(len(self._content) - self._count, len(sequences))
        self._content[self._count : self._count + room] = sequences[:room]
        self._count += room
        rest = sequences[room:]
        if not len(self._content) or not len(rest):
            return rest
        out = np.empty_like(rest)
        for i, place in enumerate(self._random().integers(self._count, size=len(rest))):
            out[i], self._content[place] = self._content[place], rest[i]
        return out

    def drain(self) -> np.ndarray:
        """All that is left, in random order."""
        out = self._content[self._random().permutation(self._count)]
        self._count = 0
        return out

    def _random(self) -> np.random.Generator:
        self._draws += 1
        return np.random.default_rng([*self.seed, self._draws])

    def state_dict(self) -> dict[str, Any]:
        """The content, and how often was drawn."""
        return {"content": torch.from_numpy(self._content[: self._count].copy()), "draws": self._draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``, which is of a buffer of this size."""
        self._count, self._draws = len(state["content"]), int(state["draws"])
        self._content[: self._count] = state["content"].numpy()
