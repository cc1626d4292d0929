"""Real gloo ranks of this machine for measurements."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(size: int, work: Callable[..., Any], **arguments: Any) -> list[Any]:
    """``work(index, size, **arguments)`` on ``size`` new gloo ranks, one thread each; the results in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (size, folder, work, arguments), nprocs=size)
        return [json.loads((Path(folder) / str(index)).read_text()) for index in range(size)]


def _run(index: int, size: int, folder: str, work: Callable[..., Any], arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(index)  # which DeepSpeed asks for
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=size)
    result = work(index, size, **arguments)
    (Path(folder) / str(index)).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
