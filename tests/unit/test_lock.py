"""The lock of a folder dies with its holder, and ranks end with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from lorapre_dist.checkpoint import CheckpointError, folder, lock
from lorapre_dist.checkpoint.folder import Manifest
from lorapre_dist.training.run import interruption


def held_by_another(directory: Path) -> int:
    """A process that holds the lock until it is killed, and a child of it that was forked while it did."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        lock.take(directory)
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        os.write(writer, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return process


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    process = held_by_another(tmp_path)
    try:
        holder = lock.take(tmp_path, wait=0)
        assert holder is not None
        assert f"host {os.uname().nodename}, process {process}, since 20" in holder
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lock, "WAIT", 0.0)
            with pytest.raises(CheckpointError, match=rf"another process saves in .*: host .* process {process}"):
                folder.start(tmp_path, "tag")
        assert not list(tmp_path.glob(".tag.partial"))
        (tmp_path / ".other.partial").mkdir()
        Manifest("other", 1, {}).write(tmp_path / ".other.partial")
        assert folder.choose(tmp_path, None) == []  # it may be about to publish that itself
    finally:
        killed(process)
    assert lock.take(tmp_path, wait=0) is None  # although a child of the holder is still there
    assert lock.take(tmp_path, wait=0) is None  # again
    lock.release(tmp_path)
    assert folder.choose(tmp_path, "other") == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_cannot_be_a_lock_is_an_error(tmp_path):
    os.mkfifo(tmp_path / lock.FILE)
    with pytest.raises(OSError, match="the lock is no file"):
        lock.take(tmp_path)


def test_where_the_file_system_knows_no_locks_there_is_a_warning(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert lock.take(tmp_path) is None
    with warnings.catch_warnings():
        lock.release(tmp_path)


@pytest.mark.parametrize(
    "command, known",
    [
        ("python -u -m deepspeed.launcher.launch --world_info=x launch/pretrain.py", True),
        ("/venv/bin/python3.11 /venv/bin/deepspeed --num_gpus 2 launch/pretrain.py", True),
        ("/venv/bin/python /venv/bin/torchrun --nproc_per_node 2 x.py", True),
        ("python -m torch.distributed.run x.py", True),
        ("python -m accelerate.commands.launch x.py", True),
        ("/usr/bin/mpirun -n 2 python x.py", True),
        ("/usr/bin/python3 /lib/deepspeed/launcher/launcher_helper.py --launcher mpich", True),
        ("bash -c deepspeed", False),
        ("python -m pytest tests/deepspeed", False),
        ("python train.py --launcher deepspeed", False),
        ("sshd: user", False),
    ],
)
def test_launchers_are_known_by_what_they_run(command, known):
    assert bool(interruption.LAUNCHER.search(interruption._program(command.split()))) == known


RANK = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("interruption", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
stop = module.StopRequest()
stop.listen()
module.end_with_launcher(poll=0.05)
print("ready", flush=True)
while stop.signal is None:
    time.sleep(0.02)
print(stop.signal, flush=True)
"""


@pytest.mark.parametrize("script, ends", [("torchrun", True), ("a_script.py", False)])
def test_a_rank_stops_when_its_launcher_is_killed(script, ends, tmp_path):
    """Whatever else started it, a shell or a script of the user's, may end before it."""
    (tmp_path / "rank.py").write_text(RANK)
    start = f"subprocess.Popen([sys.executable, {str(tmp_path / 'rank.py')!r}, {interruption.__file__!r}]).wait()"
    (tmp_path / script).write_text(f"import subprocess, sys\n{start}\n")
    launcher = subprocess.Popen([sys.executable, str(tmp_path / script)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()  # and not waited for: a zombie is no launcher either
    if ends:
        assert launcher.stdout.readline() == "SIGTERM\n"
    else:
        time.sleep(0.5)
        os.kill(int(children[0]), signal.SIGKILL)
        assert launcher.stdout.readline() == ""
    launcher.wait()
