"""Runs several at a time, each in a process of its own, on a device of its own where there are several."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lorapre_dist.training.run.ranks import end_with_parent

from .setting import Setting
from .store import Record

#: What this process has been given, in :func:`_begin`.
_own: dict[str, Any] = {}


def work(
    wanted: Callable[[set[Setting]], list[Setting]],
    done: Callable[[Record], None],
    jobs: int,
    devices: list[str],
    place: dict[str, Any],
    threads: int,
) -> None:
    """Do what is ``wanted``, in its order, until there is no more; a record goes to ``done`` as it comes.

    Args:
        wanted: the runs that can be begun, of those that are under way; asked anew after each run.
        jobs: processes at once.
        devices: given to the processes in turn.
        place: of :class:`lorapre_dist.bench.field.runs.Place`, but for the device.
        threads: of each process.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for i in range(jobs):
        queue.put(devices[i % len(devices)])
    under_way: dict[Future[Record], Setting] = {}
    with ProcessPoolExecutor(jobs, context, _begin, (queue, place, threads)) as pool:
        try:
            while True:
                todo = wanted(set(under_way.values()))
                for setting in todo[: jobs - len(under_way)]:
                    under_way[pool.submit(_run, setting)] = setting
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    setting = under_way.pop(future)
                    done(future.result())
        except BrokenProcessPool:
            ended = ", ".join(f"{s.contender} at {s.lr:g}" for s in [setting, *under_way.values()])
            print(f"error: a process ended by itself (out of memory?) during one of: {ended}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(queue: Any, place: dict[str, Any], threads: int) -> None:
    # Of the profiler that follows allocations: it says that it has begun and ended, and what was there before.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    end_with_parent()
    torch.set_num_threads(threads)
    _own["place"] = place | {"device": queue.get()}


def _run(setting: Setting) -> Record:
    from .runs import Place, run

    return run(setting, Place(**_own["place"]))
