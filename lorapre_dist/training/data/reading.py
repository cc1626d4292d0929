"""Rows of a ``datasets`` stream that survive a failed read: it is opened anew behind the last row that was read."""

from __future__ import annotations

import asyncio
import copy
import gzip
import logging
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lorapre_dist.config import ConfigError

# ``datasets`` itself tries a broken connection 20 times, 5 s apart, at the place where it broke. What it gives up on,
# and what it does not try again (a truncated file, an error of the file system), is tried this often.
ATTEMPTS = 5
# Seconds before the second attempt; doubled each time: 1, 2, 4 and 8.
FIRST_PAUSE = 1.0
# Libraries whose every error is about a connection.
NETWORK = {"aiohttp", "httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "botocore"}
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, gzip.BadGzipFile)

logger = logging.getLogger(__name__)


class ReadError(ConfigError):
    """A corpus could not be read, and trying again did not help; a run that raises it can be resumed."""


class FileError(Exception):
    """One file of a corpus cannot be read; the message begins with its name."""


class Reader:
    """The rows of a stream, a number at a time.

    Args:
        name: of the corpus, for messages.
        stream: a ``datasets.IterableDataset`` of this reader's own, for it holds the position.
        attempts: how often a read is tried.
        option: what named the corpus.
    """

    def __init__(self, name: str, stream: Any, attempts: int = ATTEMPTS, option: str = "--dataset") -> None:
        self.name, self.stream, self.attempts, self.option = name, stream, attempts, option
        self.ended = False
        self._rows: Iterator[dict[str, Any]] | None = None
        self._position: dict[str, Any] | None = None

    def read(self, count: int) -> list[dict[str, Any]]:
        """The next ``count`` rows; fewer where the stream ends, and then ``ended`` is set.

        Raises:
            ReadError: the last attempt failed too. The position is as before the call.
            ConfigError: what is there is no data; trying again would not help.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                if self._rows is None:
                    self._rows = iter(self.stream)
                rows = list(islice(self._rows, count))
            except Exception as error:  # datasets raises many kinds, from network errors to bare Exception
                # A generator that has raised is at its end, which must not be taken for the end of the stream.
                self.load_state_dict(self.state_dict())
                if not transient(error):
                    raise ConfigError(f"{self.option} {self.name}: cannot be read: {first_line(error)}") from error
                if attempt == self.attempts:
                    raise ReadError(
                        f"{self.option} {self.name}: cannot be read, tried {attempt} times: {first_line(error)}"
                    ) from error
                pause = FIRST_PAUSE * 2 ** (attempt - 1)
                logger.warning("%s: %s; trying again in %.0f s", self.name, first_line(error), pause)
                time.sleep(pause)
            else:
                self.ended = len(rows) < count
                self._position = copy.deepcopy(self.stream.state_dict())
                return rows
        raise AssertionError("unreachable")

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last row; plain values."""
        return {"ended": self.ended, "position": copy.deepcopy(self._position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``."""
        self.ended, self._position = bool(state["ended"]), copy.deepcopy(state["position"])
        # Without a position it starts at the beginning, also after an earlier one was loaded.
        self.stream.load_state_dict(copy.deepcopy(self._position))
        self._rows = None


def private(stream: Any) -> Any:
    """The same rows under a position of their own."""
    return stream.shard(num_shards=1, index=0)


def transient(error: BaseException) -> bool:
    """Whether trying again may help: errors of connections and of the file system, and files that end too early."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if any(isinstance(e, PERMANENT) for e in chain):
        return False
    kinds = (OSError, EOFError, zlib.error, asyncio.TimeoutError)
    return any(isinstance(e, kinds) or type(e).__module__.split(".")[0] in NETWORK for e in chain)


def first_line(error: BaseException) -> str:
    """The innermost cause of ``error`` that a file is named with, or else the innermost, in one line."""
    while error.__cause__ is not None and not isinstance(error, FileError):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if isinstance(error, FileError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
