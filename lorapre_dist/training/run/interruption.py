"""What ends a run early and leaves it resumable: a scheduler's signal, a rank or launcher that is gone, output nobody
reads.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

from lorapre_dist.config import extras

# ``EX_TEMPFAIL`` of sysexits.h: nothing is wrong, start the same command again.
EXIT_STOPPED = 75

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# How gloo says that a peer is gone, silent or unreachable; it raises a plain RuntimeError.
LOST_BY_GLOO = ("Connection closed by peer", "Timed out waiting", "timed out", "Connection reset", "Broken pipe")
# What every later collective on that connection says.
CLOSED_BY_GLOO = "Application timeout caused pair closure"


class StopRequest:
    """Notes SIGTERM and SIGUSR1, so that the loop can end the step it is in and save.

    A signal may reach one rank only (a launcher ends its children one after the other): the loop asks all ranks.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def listen(self) -> None:
        """From now on the signals do nothing but set ``signal``; until the process ends."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name


# Programs that start ranks, wait for them and end them: without one nobody would.
LAUNCHER = re.compile(
    r"(^|/)(deepspeed|ds|torchrun|accelerate(-launch)?|mpirun|mpiexec|mpiexec\.hydra|hydra_pmi_proxy|orte(run|d)|prte(run|d))"
    r"(\.pt)?$|(^|/)launcher_helper\.py$|deepspeed[./]launcher[./]|torch[./]distributed[./](run|launch)|accelerate[./]commands"
)
#: Seconds that a rank without a launcher has to end its step and save.
GRACE = 300.0


def end_with_launcher(poll: float = 1.0) -> None:
    """From now on, should a launcher that started this process be killed, stop as at a SIGTERM.

    The launchers are the nearest ancestors of this process that are known as such (:data:`LAUNCHER`), without a gap:
    ``deepspeed`` and the helper that it starts, say. A shell is none: a run that was started from one may outlive it.
    """
    launchers = list(_launchers())
    if launchers:
        threading.Thread(target=_watch, args=(launchers, poll), name="launcher", daemon=True).start()


def _launchers() -> Iterator[Any]:
    if not extras.has("psutil"):  # a program's options are still read then; what it lacks is said after that
        return
    import psutil

    try:
        for process in psutil.Process().parents():
            if not LAUNCHER.search(_program(process.cmdline())):
                return
            yield process
    except psutil.Error:
        return


def _program(command: Sequence[str]) -> str:
    """What a command line runs: of an interpreter's its script or module."""
    words = iter(command)
    name = next(words, "")
    if not os.path.basename(name).startswith("python"):
        return name
    for word in words:
        if word == "-m":
            return next(words, "")
        if not word.startswith("-"):
            return word
    return name


def _watch(launchers: Sequence[Any], poll: float) -> None:
    while all(_is_alive(process) for process in launchers):
        time.sleep(poll)
    print("the launcher is gone: this rank stops", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(process: Any) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def limit_waits(seconds: float) -> timedelta:
    """Let every process group made from now on wait at most ``seconds`` for a peer; returns it as a timedelta.

    DeepSpeed makes its sub-groups without naming a timeout, and torch then takes a default of its own (30 minutes with
    gloo), not the world's: so the default is what has to change.
    """
    import torch.distributed.distributed_c10d as c10d

    limit = timedelta(seconds=seconds)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = limit
    return limit


def lost_rank(error: BaseException) -> str | None:
    """One line about the connection, if ``error`` or what led to it says that another rank is gone; else None."""
    lost: str | None = None
    cause: BaseException | None = error
    while cause is not None:  # the first one knows best
        lost, cause = _lost_connection(cause) or lost, cause.__cause__ or cause.__context__
    return lost


def _lost_connection(error: BaseException) -> str | None:
    import torch.distributed as dist

    text = " ".join(str(error).split())
    from_gloo = ("gloo" in text.lower() and any(sign in text for sign in LOST_BY_GLOO)) or text == CLOSED_BY_GLOO
    if not (from_gloo or isinstance(error, dist.DistError)):
        return None
    # "[/build/path/gloo/transport/tcp/pair.cc:554] Connection closed by peer [10.0.0.2]:41. This is typically ..."
    where, found, reason = text.partition("] ")
    return (reason if found and where.startswith("[") else text).split(". ", 1)[0]


def outlive_the_terminal() -> None:
    """Where a write finds that its reader is gone (a dead launcher or ssh), write to nowhere instead of failing.

    Else the first line about a signal, or the next refresh of the progress bar, would end the run before it has saved.
    """
    for name in ("stdout", "stderr"):
        setattr(sys, name, _Outliving(getattr(sys, name)))


class _Outliving:
    """A text stream that swallows a broken pipe, once; from then on its file descriptor is ``/dev/null``."""

    def __init__(self, stream: object) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try("write", text) or 0

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *args: str) -> int | None:
        try:
            return getattr(self._stream, method)(*args)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # type: ignore[attr-defined]
            os.close(nowhere)
            return None
