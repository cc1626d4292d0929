from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import documents

REPO = Path(__file__).resolve().parents[2]
PRETRAIN = REPO / "launch" / "pretrain.py"
FINETUNE = REPO / "launch" / "finetune.py"
#: A config.json whose steps take no time.
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 400,
    "max_position_embeddings": 64,
}


def environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join([str(REPO), *filter(None, [kept.get("PYTHONPATH")])])
    # DeepSpeed decorates its Muon with torch.compile, which imports torch's compiler in every rank: seconds of a core.
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(ranks: int, *options: str, program: Path = PRETRAIN) -> subprocess.Popen[str]:
    """A program on ``ranks`` ranks under the deepspeed launcher, in a session (and process group) of its own."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error", "--num_gpus", str(ranks)]
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [*launcher, *address, str(program), *options]
    return subprocess.Popen(
        command,
        env=environment(),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; the whole group is killed if it runs too long."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        pytest.fail(f"no end after {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and its ranks, which are in its session and group."""
    os.killpg(process.pid, signal.SIGKILL)


def group_members(group: int) -> list[int]:
    """Processes of a process group that are still there and not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Callable[[], bool], timeout: float, process: subprocess.Popen[str]) -> None:
    end = time.time() + timeout
    while not condition():
        if process.poll() is not None:
            out, err = process.communicate()
            pytest.fail(f"ended with {process.returncode} too early\n{out[-3000:]}\n{err[-3000:]}")
        if time.time() > end:
            kill(process)
            pytest.fail("waited too long")
        time.sleep(0.05)


def ds_json(path: Path, **changes: Any) -> str:
    """A DeepSpeed JSON for two CPU ranks with some keys changed; ``params`` changes the optimizer's."""
    params = {"lr": 0.01, "rank": 16, "rank_v": 2, "scale": 0.1, "betas": [0.9, 0.99]} | changes.pop("params", {})
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
        "optimizer": {"type": "LoRAPre", "params": params},
        "zero_optimization": {"stage": 2},
    }
    path.write_text(json.dumps(config | changes))
    return str(path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(400, 80)))
    return path


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def base_options(corpus: Path, data_cache: Path) -> list[str]:
    """Everything but the DeepSpeed JSON, the number of steps and the output folder."""
    sizes = ["--vocab_size", "400", "--seq_len", "32", "--eval_batches", "2"]
    return ["--dataset", str(corpus), "--data_cache", str(data_cache), *sizes, "--no_progress"]
