"""The end of a process whose ranks use gloo.

A thread of gloo may hold the tensors of the last collective a little longer than the collective takes. To let go of
them it needs the interpreter's lock, and where the interpreter is ending by then torch aborts: "terminate called
without an active exception", exit code 134 or -6, of a program that has done all it should
(https://github.com/pytorch/pytorch/issues/190489). So such a process waits for its threads before the interpreter ends.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
from pathlib import Path

import torch.distributed as dist

#: Looks in a row in which no other thread runs.
LOOKS = 3
#: Seconds between two looks.
PAUSE = 0.005


def wait_at_exit() -> None:
    """Let this process wait for its threads at its end, if it has a process group of gloo."""
    if dist.get_world_size() > 1 and "gloo" in str(dist.get_backend_config()):
        _register()


@functools.cache
def _register() -> None:
    atexit.register(wait_for_threads)


def wait_for_threads(limit: float = 1.0) -> None:
    """Wait until no other thread of this process runs; at most ``limit`` seconds.

    Threads that wait for the interpreter's lock have it meanwhile. Where the system does not tell, it waits a moment.
    """
    end, quiet = time.monotonic() + limit, 0
    while quiet < LOOKS and time.monotonic() < end:
        time.sleep(PAUSE)
        quiet = 0 if _others_run() else quiet + 1


def _others_run() -> bool:
    """Whether a thread of this process beside the calling one runs, or would if there was a processor for it."""
    for task in Path("/proc/self/task").glob("[0-9]*"):
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if state == "R" and int(task.name) != threading.get_native_id():
            return True
    return False
