"""The buffers in shared memory of DeepSpeed's ranks on a CPU: without a name as soon as every rank has them.

Each rank makes one of 66 MiB in ``/dev/shm``, opens those of the others by name, and leaves it behind when it ends.
What is open stays usable without a name, and then goes with its last process, however that ends.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

FOLDER = Path("/dev/shm")


def unlink_when_open(comm: Any) -> None:
    """Let ``TorchBackend`` of the module ``deepspeed.comm.torch`` take away the names when its last rank is ready."""
    start = comm.TorchBackend.__init__

    @functools.wraps(start)
    def start_and_unlink(backend: Any, *args: Any, **kwargs: Any) -> None:
        start(backend, *args, **kwargs)
        if backend.shm_comm_op is not None:
            _ready(backend.get_world_size())

    comm.TorchBackend.__init__ = start_and_unlink


def _ready(world_size: int) -> None:
    """Count this rank; the last one unlinks. No rank waits for another: one that does not count leaves it as it was."""
    from torch.distributed.distributed_c10d import _get_default_store

    if _get_default_store().add("lorapre_dist/rank_buffers", 1) % world_size == 0:
        prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ.get('MASTER_ADDR', '')}"
        for rank in range(world_size):
            (FOLDER / f"{prefix}_{os.environ.get('MASTER_PORT', '')}_{rank}").unlink(missing_ok=True)
