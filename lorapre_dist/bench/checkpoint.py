"""Memory and time of saving, loading and consolidating a checkpoint of a model's shapes, in one process.

    python -m lorapre_dist.bench checkpoint --model llama-350m --rank 256

Each phase runs in a process of its own; its figure is the peak of resident memory above what was there when it began.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lorapre_dist.checkpoint import loading, run
from lorapre_dist.checkpoint.consolidate import consolidate
from lorapre_dist.optimizers import LoRAPre
from lorapre_dist.training.engines.presets import PRESETS

from .options import bench_parser
from .shapes import projections

PHASES = ("save", "background save", "load", "consolidate")


def main(argv: list[str]) -> None:
    """Print the table; ``--json FILE`` writes the figures."""
    parser = bench_parser("checkpoint", __doc__)
    parser.add_argument("--model", default="llama-350m")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    if args.phase:
        print(json.dumps(phase(args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        command = [sys.executable, "-m", "lorapre_dist.bench", "checkpoint", "--model", args.model]
        command += ["--rank", str(args.rank), "--folder", folder, "--phase"]
        found = {}
        for name in args.phases:
            done = subprocess.run([*command, name], check=True, stdout=subprocess.PIPE, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    size = max(figures["state"] for figures in found.values())
    print(f"{args.model}, rank {args.rank}: {size / 2**20:,.0f} MiB of weights and optimizer state")
    for name, figures in found.items():
        extra = figures["peak"] / 2**20
        print(f"  {name:<16} {figures['seconds']:6.1f} s, {extra:8,.0f} MiB above what was there")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def phase(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of state, seconds, and bytes of resident memory that one phase adds."""
    folder = Path(args.folder)
    if args.phase == "consolidate":
        return _measured(0, lambda: consolidate(folder / "save", folder / "out"))
    torch.manual_seed(0)
    shapes = [*projections(args.model), *_embeddings(args.model)]
    params = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in shapes]
    optimizer = LoRAPre(params, rank=args.rank)
    state = optimizer.memory_report().state_bytes + sum(p.numel() * 4 for _, p in params)
    for tensors in optimizer.factors().values():  # pages that were never written to are not in memory
        for tensor in tensors.values():
            tensor.normal_()
    job = run.Job(optimizer, 1)
    if args.phase == "load":
        return _measured(state, lambda: loading.load(folder / "save", optimizer))
    if args.phase == "save":
        return _measured(state, lambda: run.save(job, folder, "save"))
    return _measured(state, lambda: run.save_in_background(job, folder, "background", group=None).wait())


def _embeddings(model: str) -> list[tuple[str, tuple[int, int]]]:
    shape = (PRESETS[model].vocab_size, PRESETS[model].hidden_size)
    return [("embed_tokens.weight", shape), ("lm_head.weight", shape)]


def _measured(state: int, work: Any) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before, begin = _status("VmRSS"), time.perf_counter()
    work()
    return {"state": state, "seconds": time.perf_counter() - begin, "peak": _status("VmHWM") - before}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
