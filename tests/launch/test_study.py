"""launch/study.sh, in an environment that is as if it had installed it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TINY = ["--steps", "2", "--screen_steps", "1", "--batch", "2", "--seq_len", "16", "--micro_batch", "1", "--seeds", "0"]


@pytest.fixture
def environment(tmp_path):
    """Variables under which nothing is to be installed and no op to be built."""
    venv, ops = tmp_path / "venv", tmp_path / "ops"
    (venv / "bin").mkdir(parents=True)
    ops.mkdir()
    (ops / ".built").touch()
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    wanted = 'echo -n "$(cat constraints.txt setup.py | cksum) $PWD"'
    stamp = subprocess.run(["bash", "-c", wanted], cwd=REPO, capture_output=True, text=True, check=True).stdout
    (venv / ".lorapre-installed").write_text(stamp)
    return os.environ | {"LORAPRE_VENV": str(venv), "TORCH_EXTENSIONS_DIR": str(ops), "LORAPRE_CACHE": str(tmp_path)}


def study(environment, *words):
    return subprocess.run(
        ["bash", REPO / "launch" / "study.sh", *words], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_it_runs_on_a_cpu_and_goes_on(environment, tmp_path):
    texts = [" ".join(f"word{(7 * i + j) % 97}" for j in range(40)) + f" end of text {i}." for i in range(60)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["llama-tiny", *TINY, "--dataset", str(corpus), "--out", str(tmp_path / "out"), "--lrs", "0.001"]
    ended = study(environment, *words, "--rows", "adamw", "lorapre-8")
    assert ended.returncode == 0, ended.stderr
    assert "| LoRAPre | 16 |" in ended.stdout and "| AdamW | - |" in ended.stdout
    done = (tmp_path / "out" / "runs.jsonl").read_text()
    assert done.count("\n") == 2
    ended = study(environment, *words, "--rows", "adamw", "lorapre-8")
    assert ended.returncode == 0 and (tmp_path / "out" / "runs.jsonl").read_text() == done


@pytest.mark.slow
def test_what_it_cannot_do_is_one_line(environment):
    for words, message in {
        (): "error: which model? ",
        ("llama-7b",): "error: llama-7b: llama-60m, llama-130m, llama-350m or llama-tiny",
    }.items():
        ended = study(environment, *words)
        assert ended.returncode == 1 and ended.stderr.startswith(message)
    ended = study(environment | {"CUDA_VISIBLE_DEVICES": ""}, "llama-60m")
    assert ended.returncode == 1
    assert ended.stderr.endswith("error: llama-60m needs a GPU, and PyTorch finds none; llama-tiny runs on CPUs\n")
