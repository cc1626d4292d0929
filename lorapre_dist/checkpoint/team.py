"""The ranks that save or load together, and how an error on one of them becomes an error on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..config import ConfigError
from ..core.comm import all_ranks
from .files import CheckpointError, first_line


class Team:
    """The ranks of ``group`` (default: all); a single process where ``torch.distributed`` is not initialised."""

    def __init__(self, group: Any = None) -> None:
        self.active = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if self.active else 0
        self.size = dist.get_world_size(group) if self.active else 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, by rank."""
        return all_ranks(value, self.group)

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a block on every rank; if it fails on one, every rank raises the same error.

        The block may only issue collectives that end on every rank even if one fails, as DCP's do.

        Raises:
            CheckpointError: what happened on the first rank that failed.
        """
        cause: BaseException | None = None
        try:
            yield
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, CheckpointException) as error:
            cause = error
        for found in self.gather(None if cause is None else self._words(cause)):
            if found is not None:
                by = f" on rank {found[0]}" if self.size > 1 else ""
                raise CheckpointError(f"{doing} failed{by}: {found[1]}") from cause

    def _words(self, error: BaseException) -> tuple[int, str]:
        """The rank where it happened, and one line about it."""
        if isinstance(error, CheckpointException):  # DCP raises the same on every rank
            rank, (error, _) = next(iter(error.failures.items()))
            return rank, _line(error)
        return self.rank, _line(error)


def _line(error: BaseException) -> str:
    if isinstance(error, (CheckpointError, ConfigError)):
        return str(error)
    if "inline_container" in str(error):  # torch.save, when it cannot write
        return "a file could not be written to its end; is the storage full?"
    return first_line(error)
