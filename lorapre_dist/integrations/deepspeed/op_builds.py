"""DeepSpeed's ops, compiled so that a process that is killed meanwhile does not stop all later ones.

DeepSpeed compiles an op on first use, or loads it, under a lock that is a file, there or not: on a CPU the op that its
ranks meet in, and those of its own optimizers. A process killed in that moment leaves the file behind, and every later
one waits for ever. Here they go one after the other under a lock of the kernel's, which ends with its process, and say
so in it: who gets it and reads that another is still at work knows that this one is dead, and so is its file.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...config.checks import ConfigError

# A build takes 1 to 4 minutes.
BUILD_SECONDS = 900.0
LOADING = b"loading"


class BuildError(ConfigError, RuntimeError):
    """An op cannot be compiled. As DeepSpeed's own, a RuntimeError, which it catches where it can do without."""


def guard(builders: Any) -> None:
    """Let every op of the module ``deepspeed.ops.op_builder.builder`` be compiled and loaded as above."""
    jit_load = builders.OpBuilder.jit_load

    @functools.wraps(jit_load)
    def alone(builder: Any, verbose: bool = True) -> Any:
        _find_ninja()
        with _alone(builder.name):
            try:
                return jit_load(builder, verbose)
            except Exception as error:  # of processes, of the compiler, and what torch makes of them
                raise BuildError(f"DeepSpeed's op {builder.name} cannot be compiled: {_reason(error)}") from error

    builders.OpBuilder.jit_load = alone


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold the kernel's lock on an op meanwhile, and remove DeepSpeed's if it is a dead process's.

    Raises:
        BuildError: a process that knows nothing of this was killed while it built the op.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    lock = folder / "lock"
    try:
        ours = (folder / "lorapre.lock").open("ab")
        fcntl.flock(ours, fcntl.LOCK_EX)
    except OSError:  # not ours to write, or a file system without locks
        yield
        return
    with ours:
        if os.fstat(ours.fileno()).st_size:
            lock.unlink(missing_ok=True)
        if lock.exists() and time.time() - lock.stat().st_mtime > BUILD_SECONDS:
            raise BuildError(f"{lock} was left by a killed build of DeepSpeed's op {name}; delete it and start again")
        ours.truncate(0)
        ours.write(LOADING)
        ours.flush()
        if not (folder / f"{name}.so").exists():
            print(f"compiling DeepSpeed's op {name}, once: 1 to 4 minutes", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            ours.truncate(0)


def _find_ninja() -> None:
    """Also where the environment of this Python, in which it was installed, is not activated."""
    beside = os.path.dirname(sys.executable)
    if shutil.which("ninja") is None and shutil.which("ninja", path=beside):
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _reason(error: Exception) -> str:
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = get_cxx_compiler()
    if shutil.which("ninja") is None:
        return "ninja is not there; install it: pip install ninja"
    if shutil.which(compiler) is None:
        return f"the compiler {compiler} is not there; install one (apt-get install g++) or name it in CXX"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line.lower()), lines[0] if lines else type(error).__name__)
