"""Pools of gloo ranks that run many cases, and stay for the whole session.

A case is a module-level function ``case(rank, world_size, **arguments)``; what it returns or raises comes back from
every rank. A pool whose case failed or hung is killed (its own processes only) and a fresh one is started.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import forks

#: Process groups that a pool's ranks may have made before it is replaced: each has three threads, for good.
MOST_GROUPS = 40

_pools: dict[int, Pool] = {}


class RankFailure(AssertionError):
    """What a rank raised, with its traceback."""


class Pool:
    """``world_size`` processes that have joined one gloo group through a file store."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.mkdtemp(prefix="lorapre-ranks-")
        self.port = port = forks.free_port()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            process = forks.process(_serve, rank, world_size, self.folder, port, theirs, daemon=True)
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case: Callable[..., Any], timeout: float, **arguments: Any) -> list[Any]:
        """Run ``case`` on every rank; the results in order of rank."""
        for pipe in self.pipes:
            pipe.send((case, arguments))
        results, failures, groups = [], [], 0
        for rank, pipe in enumerate(self.pipes):
            # After a first failure the others are most likely stuck in a collective.
            if not pipe.poll(timeout if not failures else 5):
                failures.append(f"rank {rank}: no answer after {timeout:.0f} s")
                continue
            try:
                ok, value, groups = pipe.recv()
            except EOFError:
                ok, value = False, self.ended(rank)
            if ok:
                results.append(value)
            else:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.kill()
            raise RankFailure("\n".join(failures))
        if groups > MOST_GROUPS:
            self.kill()
        return results

    def ended(self, rank: int) -> str:
        """How a rank that is no longer there ended, and where its threads were if by a signal such as SIGSEGV."""
        self.processes[rank].join(timeout=10)
        fault = Path(self.folder, f"{rank}.fault")
        said = fault.read_text().partition("Extension modules")[0] if fault.exists() else ""
        return f"the process ended with {self.processes[rank].exitcode} (negative: the signal)\n{said}"

    def kill(self) -> None:
        """End the pool's processes."""
        _pools.pop(self.world_size, None)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def run_ranks(world_size: int, case: Callable[..., Any], timeout: float = 180, **arguments: Any) -> list[Any]:
    """Run ``case(rank, world_size, **arguments)`` on ``world_size`` ranks; the results in order of rank."""
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = Pool(world_size)
    return pool.run(case, timeout, **arguments)


def close_pools() -> None:
    """End every pool: its ranks end by themselves once nobody can send them a case, or soon after."""
    for pool in list(_pools.values()):
        for pipe in pool.pipes:
            pipe.close()
        for process in pool.processes:
            process.join(timeout=10)
        pool.kill()


atexit.register(close_pools)


def _serve(rank: int, world_size: int, folder: str, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    said = open(os.path.join(folder, f"{rank}.fault"), "w")  # noqa: SIM115  # as long as the process
    faulthandler.enable(said)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            case, arguments = pipe.recv()
            try:
                ok, value = True, case(rank, world_size, **arguments)
            except BaseException:
                ok, value = False, traceback.format_exc()
            pipe.send((ok, value, len(torch.distributed.distributed_c10d._world.pg_map)))
