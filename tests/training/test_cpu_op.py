"""A process that is killed while it loads DeepSpeed's CPU op stops no later one."""

from __future__ import annotations

import importlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lorapre_dist.training import cpu_op

ROOT = Path(__file__).resolve().parents[2]
# In place of the build: DeepSpeed's lock is taken, and then the process ends in one way or another.
DYING = """
import os, sys, time
import deepspeed.comm
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton
from lorapre_dist.training import cpu_op

def build():
    baton = FileBaton(os.path.join(_get_build_directory("deepspeed_shm_comm", verbose=False), "lock"))
    assert baton.try_acquire()
    print("loading", flush=True)
    if sys.argv[1] == "fails":
        baton.release()
        raise RuntimeError("no compiler")
    time.sleep(60)

sys.modules["deepspeed.comm.torch"].build_shm_op = build
print("ready", flush=True)
cpu_op.load()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # As on a machine without a GPU, the only kind where DeepSpeed loads the op.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.fixture
def builds(folder, monkeypatch):
    """How often the op is built, in place of building it."""
    found: list[Path] = []
    importlib.import_module("deepspeed.comm")
    monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: found.append(lock(folder)))
    return found


def lock(folder: Path) -> Path:
    (found,) = folder.glob("**/lorapre.lock")
    return found.with_name("lock")


def start(how: str, until: str = "loading") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", DYING, how], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    read_until(until, process)
    return process


def read_until(word: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while word not in process.stdout.readline():
        assert process.poll() is None


def test_what_a_killed_process_leaves_is_taken_away(folder, builds):
    process = start("hangs")
    assert lock(folder).exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    cpu_op.load()
    assert len(builds) == 1 and not lock(folder).exists()
    assert lock(folder).with_name("lorapre.lock").read_bytes() == b""


def test_one_that_lives_is_waited_for(folder):
    first, second = start("hangs"), start("hangs", until="ready")
    assert second.stdout is not None
    assert select.select([second.stdout], [], [], 3)[0] == []
    first.kill()
    first.wait()
    read_until("loading", second)
    second.kill()
    second.wait()


def test_a_failed_build_leaves_nothing(folder, builds):
    assert start("fails").wait() != 0
    cpu_op.load()
    assert len(builds) == 1 and not lock(folder).exists()


def test_the_lock_of_another_program_is_left_alone_unless_it_is_old(folder, builds):
    cpu_op.load()
    lock(folder).touch()
    cpu_op.load()
    assert len(builds) == 2 and lock(folder).exists()
    old = time.time() - cpu_op.BUILD_SECONDS - 60
    os.utime(lock(folder), (old, old))
    with pytest.raises(cpu_op.ConfigError, match="left by a killed build"):
        cpu_op.load()
