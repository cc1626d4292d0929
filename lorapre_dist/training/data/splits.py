"""Which documents are held out for evaluation: decided by their content, so order and sharding do not matter."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.cache_files import build_once
from lorapre_dist.training.data.documents import Source

HASH_RANGE = 2**64
# More held-out text than this is never evaluated.
MOST_CHARACTERS = 40_000_000


@dataclass(frozen=True)
class Split:
    """Documents whose hash is below ``threshold`` are held out; equal documents fall on one side.

    ``tail`` is the fraction of the training tokens' end that is held out instead, where a corpus has too few
    documents to hold out whole ones.
    """

    threshold: int = 0
    tail: float = 0.0

    def held_out(self, text: str) -> bool:
        """Whether the document ``text`` belongs to the held-out part."""
        return self.threshold > 0 and text_hash(text) < self.threshold


def text_hash(text: str) -> int:
    """A 64-bit hash of ``text``, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def streaming_split(fraction: float) -> Split:
    """Hold out about ``fraction`` of the documents of a stream that cannot be read through beforehand."""
    return Split(threshold=int(fraction * HASH_RANGE))


def finite_split(source: Source, fraction: float, cache: Path) -> Split:
    """Hold out whole documents that make up about ``fraction`` of the text of ``source``.

    Raises:
        ConfigError: the corpus is empty.
    """

    def build(folder: Path) -> None:
        split = _choose(source, fraction)
        (folder / "split.json").write_text(json.dumps({"threshold": split.threshold, "tail": split.tail}))

    folder = build_once(cache / "splits" / f"{source.fingerprint}-{fraction}", build)
    return Split(**json.loads((folder / "split.json").read_text()))


def _choose(source: Source, fraction: float) -> Split:
    hashes, lengths = [], []
    for text in source.documents():
        hashes.append(text_hash(text))
        lengths.append(len(text))
    if not lengths:
        raise ConfigError(f"--dataset {source.name}: holds no text")
    order = np.argsort(np.asarray(hashes, dtype=np.uint64), kind="stable")
    ordered = [hashes[i] for i in order]
    reached = np.cumsum(np.asarray(lengths)[order])
    total = int(reached[-1])
    quota = min(fraction * total, MOST_CHARACTERS)
    last = int(np.searchsorted(reached, quota))
    # A few huge documents: whole ones would hold out far more than was asked for.
    if last + 1 >= len(ordered) or reached[last] > max(2 * fraction, 0.2) * total:
        return Split(tail=fraction)
    return Split(threshold=ordered[last] + 1)
