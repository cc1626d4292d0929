"""The parts of a tokenised corpus: one shard's documents, written to files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorapre_dist.checkpoint.folder import describe, write_atomically
from lorapre_dist.training.data.documents import Source, stream_of, texts
from lorapre_dist.training.data.reading import Reader
from lorapre_dist.training.data.splits import Split
from lorapre_dist.training.data.tokenized import PARTS, TOKENIZER, WORK
from lorapre_dist.training.data.tokenizer import Encoder, load_tokenizer

PULL_ROWS = 256


@dataclass(frozen=True)
class Job:
    """What to tokenise, and how; the fields up to ``vocab_size`` are those of the training program.

    Attributes:
        out: folder to write.
        max_tokens: end after the part with which there are this many to train on.
        eval_tokens: of a held-out text of its own, this many.
        part_tokens: a file ends behind the document with which it has this many.
        workers: processes.
    """

    dataset: str
    dataset_config: str | None
    dataset_split: str
    eval_dataset: str | None
    eval_split: str
    text_column: str | None
    read_attempts: int
    eval_fraction: float
    tokenizer: str | None
    vocab_size: int | None
    data_cache: str
    out: str
    max_tokens: int | None
    eval_tokens: int
    part_tokens: int
    workers: int
    streaming: bool = True

    @property
    def folder(self) -> Path:
        """``out`` as a path."""
        return Path(self.out)


@dataclass(frozen=True)
class Portion:
    """One source, and to which part its documents go: ``split`` holds some out if ``part`` is ``"train"``."""

    source: Source
    part: str
    split: Split
    limit: int | None


def count_of(entry: dict[str, Any], part: str) -> int:
    """Tokens of ``part`` in what :meth:`Writer.shard` returns for a part."""
    return entry[part]["tokens"] if entry.get(part) else 0


class Writer:
    """Writes the shards of a portion, each in one go or behind the parts that are there.

    Args:
        stopped: asked often; once it is true the shard is left as it is.
        count: told the tokens of each step.
    """

    def __init__(
        self,
        job: Job,
        portion: Portion,
        stopped: Callable[[], bool] = lambda: False,
        count: Callable[[int], Any] = lambda tokens: None,
    ) -> None:
        self.job, self.portion, self.part = job, portion, portion.part
        self.stopped, self.count = stopped, count
        self.encoder = Encoder(load_tokenizer(str(job.folder / TOKENIZER)))
        self.dtype = token_type(len(self.encoder.tokenizer))
        self.part_tokens = min(job.part_tokens, portion.limit or job.part_tokens)

    def shard(self, number: int) -> list[dict[str, Any]]:
        """What is in each part of shard ``number``, in order: those that are there, and those that were missing."""
        source = self.portion.source
        data = stream_of(source)
        reader = Reader(source.name, data.shard(num_shards=data.num_shards, index=number), source.attempts)
        entries: list[dict[str, Any]] = []
        while not self._complete(entries) and not self.stopped():
            name = f"{number:05d}-{len(entries):04d}"
            note = self.job.folder / WORK / f"{self.part}-{name}.json"
            if note.is_file():
                entry = json.loads(note.read_text(encoding="utf-8"))
                reader.load_state_dict(entry["reader"])
                self.count(count_of(entry, self.part))
            else:
                written = self._write_part(reader, name)
                if written is None:
                    break
                entry = written
                write_atomically(note, json.dumps(entry))
            entries.append(entry)
        return entries

    def _complete(self, entries: list[dict[str, Any]]) -> bool:
        if entries and entries[-1]["reader"]["ended"]:
            return True
        limit = self.portion.limit
        return limit is not None and sum(count_of(entry, self.part) for entry in entries) >= limit

    def _write_part(self, reader: Reader, name: str) -> dict[str, Any] | None:
        """The next part of a shard; ``None`` if it was stopped, and then nothing is left of it."""
        with contextlib.ExitStack() as stack:
            files = {part: PartFile(self.job.folder / f"{part}-{name}.bin", self.dtype) for part in PARTS}
            for file in files.values():
                stack.callback(file.discard)
            while files[self.part].tokens < self.part_tokens and not reader.ended:
                if self.stopped():
                    return None
                before = files[self.part].tokens
                found = texts(self.portion.source.name, self.portion.source.column, reader.read(PULL_ROWS))
                for text, ids in zip(found, self.encoder(found) if found else [], strict=True):
                    held_out = self.part == "train" and self.portion.split.held_out(text)
                    files["held_out" if held_out else self.part].write(ids)
                self.count(files[self.part].tokens - before)
            return {**{part: file.close() for part, file in files.items()}, "reader": reader.state_dict()}


class PartFile:
    """A file of token ids that appears under its name when it is complete; without a token there is none."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.tokens = self.documents = 0
        self._file = open(self.temporary, "wb")  # noqa: SIM115

    def write(self, ids: list[int]) -> None:
        """Append one document."""
        self._file.write(np.asarray(ids, dtype=self.dtype).tobytes())
        self.tokens, self.documents = self.tokens + len(ids), self.documents + 1

    def close(self) -> dict[str, Any] | None:
        """Make the file durable and visible; what is in it."""
        self._file.close()
        if not self.tokens:
            return None
        facts = describe(self.temporary)
        self.temporary.replace(self.path)
        return {"name": self.path.name, "tokens": self.tokens, "documents": self.documents, **facts}

    def discard(self) -> None:
        """Remove what was not closed."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def token_type(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
