"""Who this process is, and errors that every rank agrees on."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from lorapre_dist.config import ConfigError

if TYPE_CHECKING:
    import torch

# The launcher polls its children once a second and stops the others when one fails. Ranks other than 0 wait a
# little longer than that, so that one bad setting gives one line and not one line per rank.
YIELD_SECONDS = 5.0
# Seconds of silence before a wait is explained.
PATIENCE = 3.0


class AgreedError(ConfigError):
    """A :class:`ConfigError` that every rank raises, so that rank 0 can speak for all."""


def rank() -> int:
    """Global rank that the launcher assigned, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Rank on this machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of ranks, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def end_with_parent() -> None:
    """End this process, which ``multiprocessing`` has started, when its parent ends, even by SIGKILL."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Say on rank 0 what a block waits for, if it takes longer than :data:`PATIENCE`."""
    timer = threading.Timer(PATIENCE, lambda: print(f"waiting    {what}", file=sys.stderr, flush=True))
    timer.daemon = True
    if rank() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def together() -> Iterator[None]:
    """Run a block that issues no collective; if it fails on any rank, raise the same error on every rank.

    Raises:
        AgreedError: the first failing rank's :class:`ConfigError`.
    """
    from lorapre_dist.core.comm import all_ranks

    error: ConfigError | None = None
    try:
        yield
    except ConfigError as caught:
        error = caught
    messages = all_ranks(None if error is None else str(error))
    for failing, text in enumerate(messages):
        if text is not None:
            everywhere = all(other == text for other in messages)
            raise AgreedError(text if everywhere or failing == 0 else f"rank {failing}: {text}") from error


def agree_on(name: str, value: object) -> None:
    """Raise :class:`AgreedError` unless every rank holds the same ``value``."""
    from lorapre_dist.core.comm import all_ranks

    values = all_ranks(value)
    if any(other != values[0] for other in values):
        raise AgreedError(f"the ranks disagree on {name}: {values}; give all machines the same files")


def gathered(value: Any) -> list[Any]:
    """Every rank's ``value``, in order of rank; a collective that touches no device."""
    import torch.distributed as dist

    from lorapre_dist.core.comm import all_ranks

    return all_ranks(value, _cpu_group() if dist.is_initialized() else None)


@cache
def _cpu_group() -> Any:
    import torch.distributed as dist

    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def one_line(main: Callable[[], object]) -> int:
    """Run ``main``; 0, or 2 after one line about bad input or a checkpoint that does not fit."""
    from lorapre_dist.checkpoint import CheckpointError

    try:
        main()
    except (ConfigError, CheckpointError) as error:
        return report(error)
    return 0


def report(error: Exception) -> int:
    """Write one line about ``error`` to stderr, from rank 0 where possible; the exit code is 2."""
    if rank() != 0:
        sys.stderr.flush()
        time.sleep(YIELD_SECONDS)
        if isinstance(error, AgreedError):
            return 2
    prefix = "error" if rank() == 0 else f"error on rank {rank()}"
    print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2
