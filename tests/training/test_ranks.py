"""What a program says while it waits, and when it crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorapre_dist.training.run import ranks


def test_a_long_wait_is_explained_once_on_rank_0(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "PATIENCE", 0.02)
    with ranks.saying("for the hub: dataset c4"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "waiting    for the hub: dataset c4\n"
    monkeypatch.setenv("RANK", "1")
    with ranks.saying("for the hub: dataset c4"):
        time.sleep(0.1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ranks, "PATIENCE", 60.0)
    with ranks.saying("for the hub: dataset c4"):
        pass
    assert capsys.readouterr().err == ""


CRASH = """
import os, signal
from lorapre_dist.training.run.program import script

def train():
    os.kill(os.getpid(), signal.SIGSEGV)

script(train)
"""


def test_a_crash_in_native_code_says_where_python_was():
    ended = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.stderr and " in train\n" in ended.stderr


#: Each starts a process that would stay for an hour.
FORKED = """
import time
from tests import forks

if __name__ == "__main__":
    forks.process(time.sleep, 3600)
    print("begun", flush=True)
    time.sleep(3600)
"""
SPAWNED = """
import multiprocessing, time
from lorapre_dist.training.run.ranks import end_with_parent

def stay():
    end_with_parent()
    print("begun", flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=stay).start()
    time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [FORKED, SPAWNED], ids=["the tests' own", "spawned"])
def test_a_process_ends_when_what_started_it_was_killed(program, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout.readline() == "begun\n"
    parent.kill()
    rest = parent.communicate(timeout=60)[0]  # until nobody holds stdout any more
    assert rest == ""
