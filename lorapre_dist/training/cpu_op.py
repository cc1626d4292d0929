"""DeepSpeed's CPU op, loaded so that a process that is killed meanwhile does not stop all later ones.

Where there is no accelerator, ``init_distributed`` compiles or loads an op under a lock, a file that is there or not. A
process killed in that moment leaves it behind, and every later one waits for ever. Here they load one after the other
under a lock of the kernel's, which ends with its process, and say so in it: who gets it and reads that another is still
loading knows that this one is dead, and so is its file.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from lorapre_dist.config import ConfigError

# A build takes 1 to 4 minutes.
BUILD_SECONDS = 900.0
LOADING = b"loading"


def load() -> None:
    """Load the op, for DeepSpeed to find it loaded; nothing where there is an accelerator.

    Raises:
        ConfigError: a process that knows nothing of this was killed while it built the op.
    """
    import torch
    from torch.utils.cpp_extension import _get_build_directory

    if torch.cuda.is_available():
        return
    from deepspeed.comm.torch import build_shm_op

    folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    lock = folder / "lock"
    try:
        ours = (folder / "lorapre.lock").open("ab")
        fcntl.flock(ours, fcntl.LOCK_EX)
    except OSError:  # not ours to write, or a file system without locks
        return
    with ours:
        if os.fstat(ours.fileno()).st_size:
            lock.unlink(missing_ok=True)
        if lock.exists() and time.time() - lock.stat().st_mtime > BUILD_SECONDS:
            raise ConfigError(f"{lock} was left by a killed build of DeepSpeed's CPU op; delete it and start again")
        ours.truncate(0)
        ours.write(LOADING)
        ours.flush()
        try:
            build_shm_op()
        finally:
            ours.truncate(0)
