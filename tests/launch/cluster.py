"""Runs of a tiny model on hosts of namespaces, started by the front as a user would start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launch.conftest import REPO, TINY_LLAMA, ds_json, environment
from tests.launch.hosts import INTERFACE, Hosts
from tests.training.conftest import documents

SETTINGS = """
[hosts]
hostfile = {hostfile}
interface = {interface}
threads = 1

[torchrun]
restarts = 2

[slurm]
nodes = 2
ntasks-per-node = 1
output = {folder}/slurm.out

[pretrain]
model_config = {folder}/model.json
deepspeed_config = {folder}/ds.json
dataset = {folder}/corpus.jsonl
data_cache = {folder}/cache
vocab_size = 400
seq_len = 32
max_steps = {steps}
warmup_steps = 5
eval_every = 0
eval_batches = 2
save_every = 5
keep_last = 3
no_progress = true
no_tensorboard = true
collective_timeout = {timeout}
"""
# A rank, and not the launcher before it, whose command line goes on in the same way.
RANK = r"^[^ ]*python[^ ]* -u [^ ]*/lorapre_dist/shipped/pretrain\.py "
# Importing, on a machine with other things to do.
STARTED = 240.0


class Cluster:
    """``folder`` is shared storage: corpus, settings and every run's output."""

    def __init__(self, hosts: Hosts, folder: Path, steps: int, timeout: float) -> None:
        self.hosts, self.folder, self.steps, self.timeout = hosts, folder, steps, timeout
        self._logs: dict[int, Path] = {}
        (folder / "model.json").write_text(json.dumps(TINY_LLAMA))
        lines = [json.dumps({"text": text}) + "\n" for text in documents(400, 80)]
        (folder / "corpus.jsonl").write_text("".join(lines))
        ds_json(folder / "ds.json", params={"rank": 8})
        names = {"hostfile": hosts.hostfile(1), "interface": INTERFACE, "folder": folder}
        text = SETTINGS.format(**names, steps=steps, timeout=timeout)
        (folder / "cluster.ini").write_text(text)

    def start(self, launcher: str, name: str, *more: str, **env: str) -> subprocess.Popen[str]:
        """``launch/run.py`` on the first host; ``name`` is the run's output folder."""
        options = ["--launcher", launcher, "--output_dir", str(self.folder / name), *more]
        return self.python("launch/run.py", str(self.folder / "cluster.ini"), *options, **env)

    def python(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """A Python program on the first host. What it prints goes to a file, which no forgotten child can hold open."""
        path = self.folder / f"said-{len(self._logs)}"
        command, variables = [sys.executable, *arguments], environment() | env
        with path.open("w") as log:
            outputs = {"stdout": log, "stderr": subprocess.STDOUT}
            process = self.hosts.start(self.hosts.names[0], command, env=variables, cwd=REPO, **outputs)
        self._logs[process.pid] = path
        return process

    def said(self, process: subprocess.Popen[str]) -> str:
        """All that was printed so far."""
        return self._logs[process.pid].read_text(errors="replace")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Metrics without the one column that measures time; a row that is being written does not count."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in lines]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name)[1:]]

    def wait_for_step(self, name: str, step: int, process: subprocess.Popen[str] | None = None) -> None:
        self.wait(lambda: bool(rows := self.rows(name)) and rows[-1]["step"] >= step, STARTED, process)

    def wait(self, condition: Callable[[], bool], limit: float, process: subprocess.Popen[str] | None = None) -> None:
        end = time.monotonic() + limit
        while not condition():
            if process is not None and process.poll() is not None:
                raise AssertionError(f"ended with {process.returncode} too early\n{self.said(process)}")
            if time.monotonic() > end:
                raise AssertionError(f"waited {limit} s\n{'' if process is None else self.said(process)}")
            time.sleep(0.05)

    def output(self, process: subprocess.Popen[str], limit: float) -> tuple[int, str]:
        """Exit code and all that was printed, in at most ``limit`` seconds; else the code is that of a SIGKILL."""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode, self.said(process)

    def nobody_left(self, limit: float) -> None:
        """Every rank on every host ends within ``limit`` seconds."""
        self.wait(lambda: not any(self.hosts.processes(name, RANK) for name in self.hosts.names), limit)
