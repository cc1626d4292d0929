"""A corpus as token ids on disk: what ``lorapre tokenize`` writes and training maps into memory.

    manifest.json      what is there, with bytes and checksum of each file; written last
    tokenizer/         the tokenizer, as transformers saves it
    train-*.bin        token ids, little-endian uint16 or uint32, without header: documents one behind the other, each
                       ended by the end-of-text token; in order of name they are one array
    held_out-*.bin     the same, for evaluation

A folder without ``manifest.json`` is unfinished. No sequence length is built in: training cuts the array to its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lorapre_dist.checkpoint import CheckpointError
from lorapre_dist.checkpoint.files import read_object
from lorapre_dist.checkpoint.folder import MANIFEST, describe
from lorapre_dist.config import ConfigError

FORMAT = 1
KIND = "lorapre tokens"
WORK = ".work"
TOKENIZER = "tokenizer"
PARTS = ("train", "held_out")


def is_tokenized(path: Path) -> bool:
    """Whether ``lorapre tokenize`` has written, or begun to write, the folder ``path``."""
    try:
        if (path / WORK).is_dir():
            return True
        return _manifest(path).get("kind") == KIND
    except (CheckpointError, OSError):
        return False


def _manifest(path: Path) -> dict[str, Any]:
    """``manifest.json``; the folder may be made of links, but what they lead to must be files."""
    return read_object(Path(os.path.realpath(path / MANIFEST)))


@dataclass(frozen=True)
class TokenFolder:
    """A finished folder.

    Attributes:
        content: ``manifest.json``.
    """

    path: Path
    content: dict[str, Any]

    @classmethod
    def open(cls, path: Path, check: bool = True) -> TokenFolder:
        """Read the manifest and ``check`` every file's size; nothing is read through.

        Raises:
            ConfigError: unfinished, of another format, or a file is missing, cut off or superfluous.
        """
        if not (path / MANIFEST).is_file():
            raise ConfigError(f"--dataset {path}: is unfinished; run the same 'lorapre tokenize' again to finish it")
        try:
            content = _manifest(path)
        except (CheckpointError, OSError) as error:
            raise ConfigError(f"--dataset {path}: {MANIFEST}: {error}") from error
        if content.get("format") != FORMAT:
            raise ConfigError(
                f"--dataset {path}: is of format {content.get('format')!r}; this version reads format {FORMAT}"
            )
        folder = cls(path, content)
        wrong = folder.problems(read=False) if check else []
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise ConfigError(f"--dataset {path}: {wrong[0]}{more}; 'lorapre inspect {path}' checks every file")
        return folder

    def problems(self, read: bool = True) -> list[str]:
        """What is wrong with the files, in words; ``read`` compares checksums too."""
        found = []
        for name, wanted in sorted(self.content["files"].items()):
            path = self.path / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != wanted["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}")
            elif read and describe(path)["blake2b"] != wanted["blake2b"]:
                found.append(f"{name} has a wrong checksum")
        return found

    @property
    def fingerprint(self) -> str:
        """Changes with any token and with the tokenizer."""
        facts = {name: facts["blake2b"] for name, facts in self.content["files"].items() if name.endswith(".bin")}
        text = json.dumps([self.content["tokenizer"], self.content["dtype"], facts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def tokens(self, part: str) -> TokenFiles:
        """The array of ``"train"`` or ``"held_out"``."""
        names = sorted(name for name in self.content["files"] if name.startswith(f"{part}-"))
        return TokenFiles([self.path / name for name in names], np.dtype(self.content["dtype"]).newbyteorder("<"))

    def describe(self) -> dict[str, Any]:
        """The manifest without its files, and what is wrong with them."""
        found = {key: value for key, value in self.content.items() if key != "files"}
        problems = self.problems()
        size = sum(facts["bytes"] for facts in self.content["files"].values())
        return {"path": str(self.path), "whole": not problems, "problems": problems, "bytes": size, **found}


class TokenFiles:
    """Files of token ids as one array, of which slices are read; each file is mapped when it is first needed."""

    def __init__(self, paths: list[Path], dtype: np.dtype) -> None:
        self.paths, self.dtype = paths, dtype
        self._ends = list(accumulate(path.stat().st_size // dtype.itemsize for path in paths))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: slice) -> np.ndarray:
        """Tokens at a slice of step 1, across the ends of files."""
        start, stop, _ = place.indices(len(self))
        parts = [np.zeros(0, dtype=self.dtype)]
        while start < stop:
            number = bisect_right(self._ends, start)
            first = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            parts.append(self._file(number)[start - first : end - first])
            start = end
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def _file(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._maps[number] = np.memmap(self.paths[number], dtype=self.dtype, mode="r")
        return self._maps[number]


def render(found: dict[str, Any]) -> str:
    """What ``describe`` found, in lines."""
    lines = [f"{found['path']}: {'whole' if found['whole'] else 'DAMAGED'}", *(f"  {p}" for p in found["problems"])]
    lines.append(f"  {'dataset':<14} {found['dataset']}")
    lines.append(f"  {'tokenizer':<14} {found['vocab_size']} tokens, fingerprint {found['tokenizer']}")
    for part in PARTS:
        lines.append(f"  {part:<14} {found[part]['tokens']:,} tokens, {found[part]['documents']:,} documents")
    return "\n".join([*lines, f"  {'size':<14} {found['bytes']:,} bytes of {found['dtype']}"])
