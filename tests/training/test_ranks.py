"""What a program says while it waits, and when it crashes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

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
