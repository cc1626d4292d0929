"""The folder that a run writes to, and that no other run writes to meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapre_dist.checkpoint import lock
from lorapre_dist.config import ConfigError
from lorapre_dist.training.run import ranks


def claim(folder: Path) -> None:
    """Make ``folder``; rank 0 locks it until its process ends, or :func:`release`.

    Raises:
        ConfigError: nothing can be written there, or another run has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{ranks.rank()}"
        probe.touch()
        probe.unlink()
        if ranks.rank() == 0 and (holder := lock.take(folder)):
            raise ConfigError(f"--output_dir {folder}: another run is in it ({holder}); end it, or name another folder")
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be written: {error.strerror}") from error


release = lock.release


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """:func:`claim` for as long as the block runs."""
    claim(folder)
    try:
        yield
    finally:
        release(folder)
