"""A process that is killed while it compiles an op of DeepSpeed's stops no later one, whatever it trains with."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorapre_dist.integrations.deepspeed import op_builds

ROOT = Path(__file__).resolve().parents[2]
# In place of the build: DeepSpeed's lock is taken, and then the process ends in one way or another. As in a program
# that trains with AdamW under Accelerate, the package is imported and no more.
DYING = """
import os, sys, time
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

def build(builder, verbose):
    baton = FileBaton(os.path.join(_get_build_directory(builder.name, verbose=False), "lock"))
    assert baton.try_acquire()
    print("loading", flush=True)
    if sys.argv[1] == "fails":
        baton.release()
        raise RuntimeError("no compiler")
    time.sleep(60)

OpBuilder.jit_load = build
import lorapre_dist
print("ready", flush=True)
ShareMemCommBuilder().load()
"""
OP = "deepspeed_shm_comm"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def builder(build):
    """One of DeepSpeed's, whose build is ``build``."""
    module = SimpleNamespace(OpBuilder=type("OpBuilder", (), {"name": OP, "jit_load": lambda *_: build()}))
    op_builds.guard(module)
    return module.OpBuilder()


@pytest.fixture
def builds(folder):
    """How often the op is built, and a builder that only counts."""
    found: list[Path] = []
    return found, builder(lambda: found.append(lock(folder)))


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


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_taken_away(folder, builds):
    process = start("hangs")
    assert lock(folder).exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    found, op = builds
    op.jit_load()
    assert len(found) == 1 and not lock(folder).exists()
    assert lock(folder).with_name("lorapre.lock").read_bytes() == b""


@pytest.mark.slow
def test_one_that_lives_is_waited_for(folder):
    first, second = start("hangs"), start("hangs", until="ready")
    assert second.stdout is not None
    assert select.select([second.stdout], [], [], 3)[0] == []
    first.kill()
    first.wait()
    read_until("loading", second)
    second.kill()
    second.wait()


@pytest.mark.slow
def test_a_failed_build_leaves_nothing(folder, builds):
    assert start("fails").wait() != 0
    found, op = builds
    op.jit_load()
    assert len(found) == 1 and not lock(folder).exists()


def test_the_lock_of_another_program_is_left_alone_unless_it_is_old(folder, builds):
    found, op = builds
    op.jit_load()
    lock(folder).touch()
    op.jit_load()
    assert len(found) == 2 and lock(folder).exists()
    old = time.time() - op_builds.BUILD_SECONDS - 60
    os.utime(lock(folder), (old, old))
    with pytest.raises(op_builds.ConfigError, match="left by a killed build"):
        op.jit_load()


def test_one_line_says_that_an_op_is_compiled_and_none_that_it_is_loaded(folder, builds, capsys):
    _, op = builds
    op.jit_load()
    assert capsys.readouterr().err == f"compiling DeepSpeed's op {OP}, once: 1 to 4 minutes\n"
    lock(folder).with_name(f"{OP}.so").touch()
    op.jit_load()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "missing, output, words",
    [
        ("ninja", "Ninja is required to load C++ extensions", "ninja is not there; install it: pip install ninja"),
        ("c++", "Command '['which', 'c++']' failed", "the compiler c++ is not there; install one"),
        (None, "Error building\n[1/2] c++ x\nx.cpp:1: error: no immintrin.h\nninja: stopped", "x.cpp:1: error: no imm"),
    ],
)
def test_what_a_build_needs_is_named_in_one_line(folder, monkeypatch, missing, output, words):
    def fails():
        raise RuntimeError(output)

    tools = folder / "tools"
    tools.mkdir()
    for tool in {"ninja", "c++"} - {missing}:
        (tools / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setattr(sys, "executable", str(folder / "elsewhere" / "python"))
    with pytest.raises(op_builds.BuildError, match=f"op {OP} cannot be compiled: {words}".replace("+", ".")) as caught:
        builder(fails).jit_load()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RuntimeError), "DeepSpeed goes on without an op where it catches that"


def test_ninja_beside_this_python_is_found_where_its_environment_is_not_activated(folder, monkeypatch):
    beside = folder / "venv" / "bin"
    beside.mkdir(parents=True)
    (beside / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", "/usr/nowhere")
    builder(lambda: None).jit_load()
    assert os.environ["PATH"].split(os.pathsep)[0] == str(beside)
