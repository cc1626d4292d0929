"""What runs behind training: that part of a step that the weights do not wait for.

On accelerators work is queued on a stream of its own, by the thread that trains: in the order in which that does so,
which is the same on all ranks, and nothing waits on the host. On a CPU, where a collective or a solve would hold up who
calls it, one thread does the work in the order in which it was given. Either way collectives go over process groups
that nothing else uses (:mod:`lorapre_dist.layouts.groups`), so that they and those of training cannot be taken for each
other, nor wait for each other.

What the work changes must not be looked at before :meth:`Background.wait`, which also raises what went wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Seconds that a process which ends waits for work that is under way: its peers may need it to end theirs.
ENDING = 10.0

_living: weakref.WeakSet[Background] = weakref.WeakSet()


@dataclass
class Task:
    """Work that was given away.

    Attributes:
        owners: ids of those whose state it changes.
        done: set by the thread; an event of the device where it was queued on a stream.
    """

    work: Callable[[], None] | None
    owners: frozenset[int]
    stream: Any = None
    done: Any = field(default_factory=threading.Event)
    error: BaseException | None = None


class Background:
    """Does what it is given, one after the other. Copies of an optimizer share one, so that their work has an order."""

    def __init__(self) -> None:
        self._pending: list[Task] = []
        self._queue: queue.SimpleQueue[Task | None] | None = None
        self._streams: dict[torch.device, Any] = {}
        self._error: BaseException | None = None

    def __deepcopy__(self, _: Any) -> Background:
        return self

    def __reduce__(self) -> Any:  # neither a thread nor a stream can be saved
        return Background, ()

    def run(
        self, work: Callable[[], None], owners: Iterable[Any], inputs: Iterable[Tensor], device: torch.device
    ) -> None:
        """Do ``work`` behind what this thread does next.

        Args:
            owners: whose state it changes.
            inputs: tensors that were made for it, and which nobody holds on to but ``work``.
            device: on which it works.
        """
        task = Task(work, frozenset(map(id, owners)))
        if device.type == "cuda":
            self._queue_on_stream(task, inputs, device)
        elif device.type == "cpu":
            if self._queue is None:
                self._start()
            assert self._queue is not None
            self._pending.append(task)
            self._queue.put(task)
        else:  # a device without numbers
            work()

    def wait(self, owners: Iterable[Any] | None = None) -> None:
        """Until all that changes the state of ``owners`` (None: all there is) is done; raises what went wrong.

        On accelerators the current stream waits, the host does not.
        """
        wanted = None if owners is None else frozenset(map(id, owners))
        places = [k for k, task in enumerate(self._pending) if wanted is None or task.owners & wanted]
        for task in self._pending[: places[-1] + 1] if places else ():
            if task.stream is not None:
                torch.cuda.current_stream(task.stream.device).wait_event(task.done)
            else:
                task.done.wait()
                self._error = self._error or task.error
        self._pending = [task for task in self._pending if not _over(task)]
        if self._error is not None:
            raise self._error

    def finish(self, seconds: float) -> None:
        """Give work that is under way so long to end, whatever comes of it."""
        for task in self._pending:
            if task.stream is None and not task.done.wait(seconds):
                return

    def _queue_on_stream(self, task: Task, inputs: Iterable[Tensor], device: torch.device) -> None:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        # After all that training has done so far; what it has let go of by then may be memory of this stream again.
        stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in inputs:
            tensor.record_stream(stream)
        assert task.work is not None
        with torch.cuda.stream(stream), torch.no_grad():
            task.work()
        task.work, task.stream, task.done = None, stream, stream.record_event()
        self._pending.append(task)

    def _start(self) -> None:
        self._queue = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._queue, _cuda_device()), name="lorapre", daemon=True)
        thread.start()
        weakref.finalize(self, self._queue.put, None)
        _living.add(self)


def _over(task: Task) -> bool:
    """Whether nobody has to wait for it any more: on a stream there may be others than the one that waited."""
    return bool(task.done.query()) if task.stream is not None else task.done.is_set()


def _cuda_device() -> int | None:
    """The device of this thread, which state that was offloaded to the CPU passes through."""
    return torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _serve(tasks: queue.SimpleQueue[Task | None], device: int | None) -> None:
    """The thread: after a failure the ranks no longer agree on what comes next, so that nothing more is done."""
    if device is not None:
        torch.cuda.set_device(device)
    failed: BaseException | None = None
    while (task := tasks.get()) is not None:
        try:
            if failed is None and task.work is not None:
                with torch.no_grad():
                    task.work()
        except BaseException as error:
            failed = error
        finally:
            task.work, task.error = None, failed
            task.done.set()
        del task


@atexit.register
def _finish_all() -> None:
    for one in list(_living):
        with contextlib.suppress(Exception):
            one.finish(ENDING)
