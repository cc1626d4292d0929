"""Processes forked from one that has the imports behind it: the standard library's fork server, once a session.

A rank that starts from nothing imports PyTorch, DeepSpeed and transformers, which is ten seconds of a core; one that is
forked starts at once. The server has the environment that the first fork found, with CPU ranks asked of DeepSpeed and
no hub to ask: what libraries read as they are imported cannot be set for one fork alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

REPO = Path(__file__).resolve().parents[1]
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Seconds that the ranks beside one that failed have to end on their own.
GRACE = 30.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.warm"])
_running: set[Ranks] = set()


class Ended(NamedTuple):
    """How a run ended: the exit codes of its ranks (negative: the signal), and what they printed."""

    codes: list[int]
    out: str
    err: str


def process(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> Any:
    """Start ``target``, a function of a module, in a process of its own.

    A daemon may have no children, and ends with this process.
    """
    environment = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [environment.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    started = _context.Process(target=_begin, args=(target, arguments), daemon=daemon)
    started.start()
    return started


def _begin(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import tests.warm  # noqa: F401  # says what is wrong with an import, over which the server passes in silence
    from lorapre_dist.training.run.ranks import end_with_parent

    end_with_parent()
    target(*arguments)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The ranks of one run of a program, as a launcher starts them; each is forked.

    Args:
        script: The program, relative to ``launch/``.
        argv: Its options.
        world_size: How many ranks; None for one process without a launcher.
        env: More of the environment.
        before: Called with what follows it in each rank before the program starts; a function of a module.
    """

    def __init__(
        self,
        script: str,
        argv: Sequence[str],
        world_size: int | None = 2,
        env: dict[str, str] | None = None,
        before: tuple[Callable[..., None], Any] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lorapre-run-"))
        for name in ("out", "err"):
            (self.folder / name).touch()
        count, port = world_size or 1, free_port()
        self.processes = []
        for rank in range(count):
            ranks: dict[str, Any] = {}
            if world_size is not None:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks |= env or {}
            environment = {name: str(value) for name, value in ranks.items()}
            self.processes.append(process(_program, script, list(argv), environment, self.folder, before))
        _running.add(self)

    @property
    def codes(self) -> list[int | None]:
        """Exit codes so far, None of a rank that runs."""
        return [process.exitcode for process in self.processes]

    def out(self) -> str:
        """What all ranks have printed so far."""
        return (self.folder / "out").read_text(errors="replace")

    def err(self) -> str:
        """What all ranks have written to stderr so far."""
        return (self.folder / "err").read_text(errors="replace")

    def signal(self, rank: int, number: int) -> None:
        """Send one rank a signal."""
        os.kill(self.processes[rank].pid, number)

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120.0) -> None:
        """Until ``condition``; an AssertionError if all ranks end before it, or it takes too long."""
        end = time.monotonic() + timeout
        while not condition():
            late = time.monotonic() > end
            if late or None not in self.codes:
                codes, out, err = self.kill()
                raise AssertionError(f"{'waited too long' if late else 'ended too early'}, {codes}\n{out}\n{err}")
            time.sleep(0.01)

    def finish(self, timeout: float = 240.0) -> Ended:
        """Wait for the end.

        Ranks that do not end soon after one that failed are killed. An AssertionError if none has ended badly and
        some have not ended in ``timeout`` seconds.
        """
        end, failed = time.monotonic() + timeout, False
        while None in self.codes and time.monotonic() < end:
            if not failed and any(self.codes):
                end, failed = min(end, time.monotonic() + GRACE), True
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            connection.wait(running, timeout=max(0.0, end - time.monotonic()))
        late = None in self.codes and not failed
        ended = self.kill()
        assert not late, f"no end after {timeout:.0f} s, {ended.codes}\n{ended.out[-3000:]}\n{ended.err[-3000:]}"
        return ended

    def kill(self) -> Ended:
        """SIGKILL to every rank that runs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        _running.discard(self)
        ended = Ended([process.exitcode for process in self.processes], self.out(), self.err())
        shutil.rmtree(self.folder, ignore_errors=True)
        return ended


def kill_all() -> None:
    """End every run that a test has left behind."""
    for ranks in list(_running):
        ranks.kill()


def _program(
    script: str, argv: list[str], environment: dict[str, str], folder: Path, before: tuple[Callable[..., None], Any]
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    code: Any = 70
    try:
        os.chdir(REPO)
        os.environ.update(environment)
        path = (REPO / "launch" / script).resolve()
        sys.argv, sys.path[0] = [str(path), *argv], str(path.parent)
        if before is not None:
            before[0](*before[1:])
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # the programs end so themselves
