"""Optimizer state per rank under ZeRO-3's partitioning, the peak of one step, and that of training against the plan.

    python -m lorapre_dist.bench memory --model llama-60m --rank 128 --world_sizes 1 2 3 4
    python -m lorapre_dist.bench memory --parts training --models llama-130m:256 llama-350m:256 --csv memory.csv

``state``: the state is allocated as rank 0 of each world size holds it (the largest share) and its bytes are counted.
``peak``: the growth of this process's resident memory during a step on one matrix.
``training``: live tensor bytes of whole training steps, with each option that saves memory alone and with all of them,
on the device ``meta`` (``--device cpu``: really computed, the same bytes), or with ``--layouts`` on two real ranks;
beside them what ``lorapre plan`` says.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.config.checks import choice
from lorapre_dist.core.interval import Peers
from lorapre_dist.layouts.base import Layout, Piece, Unit
from lorapre_dist.layouts.geometry.ranges import equal_ranges
from lorapre_dist.optimizers import LoRAPre
from lorapre_dist.training.engines.presets import PRESETS

from .options import bench_parser
from .shapes import projections

PARTS = ("state", "peak", "training")
LAYOUTS = ("one", "fsdp2", "zero1", "zero2", "zero3")


def main(argv: list[str]) -> None:
    """Print both tables."""
    parser = bench_parser("memory", __doc__)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rank_v", type=int)
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 5504], help="matrix of the peak measurement")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["state", "peak"])
    parser.add_argument(
        "--models", nargs="+", default=["llama-60m:128"], metavar="MODEL:RANK", help="of training, with the rank"
    )
    parser.add_argument("--tokens", type=int, default=128, help="of training, in its one sequence (default: 128)")
    parser.add_argument("--device", choices=("meta", "cpu"), default="meta", help="of training in one process")
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=["one"],
        help="of training: one device, and of two ranks others",
    )
    parser.add_argument("--options", nargs="+", metavar="NAME", help="of training, rows of the table (default: all)")
    parser.add_argument("--csv", type=Path, help="file for the rows of training")
    args = parser.parse_args(argv)
    if "state" in args.parts:
        _print_state(args)
    if "peak" in args.parts:
        _print_peak(args)
    if "training" in args.parts:
        _print_training(args)


def _print_state(args: argparse.Namespace) -> None:
    print(f"{args.model}'s matrices, rank {args.rank}, ZeRO-3, largest rank's state in MiB")
    print(f"{'ranks':>5} {'held':>10} {'4((r+r_v)(p+q)+p)/N':>20} {'ratio':>7} {'AdamW':>10}")
    for size in args.world_sizes:
        held, formula, adamw = state_bytes(args.model, args.rank, args.rank_v, size)
        row = (held / 2**20, formula / 2**20, held / formula, adamw / 2**20)
        print("{:>5} {:>10.2f} {:>20.2f} {:>7.4f} {:>10.2f}".format(size, *row))


def _print_peak(args: argparse.Namespace) -> None:
    p, q = args.shape
    peak, bound = peak_transient(p, q, args.rank, args.rank_v)
    print(f"peak transient memory of a step on {p} x {q}, rank {args.rank}: {peak / 2**20:.1f} MiB", end="")
    print(f" (reported workspace {bound / 2**20:.1f} MiB, the matrix itself {p * q * 4 / 2**20:.1f} MiB)")


def _print_training(args: argparse.Namespace) -> None:
    from . import training_memory as training  # it imports transformers and DeepSpeed
    from .ranks import spawn

    rows = []
    for name in args.options or ():
        choice("--options", name, tuple(training.OPTIONS))
    for model, rank in (_model_and_rank(text) for text in args.models):
        cases = {
            name: training.Case(model, rank, options=options, tokens=args.tokens, device=args.device)
            for name, options in training.OPTIONS.items()
            if name in (args.options or training.OPTIONS)
        }
        if "one" in args.layouts:
            rows += [_printed(training.row(case, name, training.measured(case))) for name, case in cases.items()]
        for layout in (layout for layout in args.layouts if layout != "one"):
            for name, case in cases.items():
                if name == "released" and layout.startswith("zero"):  # DeepSpeed's engine releases none
                    continue
                here = replace(case, layout=layout, device="cpu")
                found = spawn(2, training.on_rank, case=asdict(here))  # an engine is not freed in its process
                most = max((0, 1), key=lambda at: max(found[at].values()))
                rows.append(_printed(training.row(here, name, found[most], 2, most)))
    if args.csv:
        training.write(rows, args.csv)


def _printed(row: dict[str, str]) -> dict[str, str]:
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def _model_and_rank(text: str) -> tuple[str, int]:
    model, _, rank = text.partition(":")
    if model not in PRESETS or not rank.isdigit():
        raise ConfigError(f"--models {text}: must be a preset and a rank, such as llama-60m:128")
    return model, int(rank)


def closed_form(shapes: list[tuple[int, int]], rank: int, rank_v: int, world_size: int) -> float:
    """``4 ((r + r_v)(p + q) + p) / N`` bytes, summed over matrices: fp32 factors and row energies."""
    return sum(4 * ((rank + rank_v) * (p + q) + p) for p, q in shapes) / world_size


def state_bytes(model: str, rank: int, rank_v: int | None, world_size: int) -> tuple[int, float, int]:
    """Bytes held by the fullest rank, the closed form, and what AdamW would hold there."""
    named = projections(model)
    optimizer = _unbound(named, rank, rank_v)
    pieces, at = [], 0
    for name, (p, q) in named:
        ranges = equal_ranges(p * q, world_size)
        start, stop = ranges[0]
        pieces.append(Piece(name, (p, q), start, stop, at, Peers(None, ranges, 0) if world_size > 1 else None))
        at += stop - start
    optimizer.bind(Layout("ZeRO-3", [Unit(torch.empty(at), 0, pieces)], world_size))
    report = optimizer.memory_report()
    rank_v = optimizer.config.resolved_rank_v
    shapes = [shape for _, shape in named]
    return report.state_bytes, closed_form(shapes, rank, rank_v, world_size), report.adamw_state_bytes


def peak_transient(p: int, q: int, rank: int, rank_v: int | None) -> tuple[int, int]:
    """Growth of the resident set during one step on a p x q matrix, and the bound that ``memory_report`` states."""
    torch.set_num_threads(1)
    # Another optimizer's step first: BLAS allocates its own buffers on first use, and keeps them.
    for _ in range(2):
        optimizer = _unbound([("q_proj.weight", (p, q))], rank, rank_v)
        weight = optimizer.param_groups[0]["params"][0]
        weight.data = torch.randn(p, q)
        weight.grad = torch.randn(p, q)
        bound = optimizer.memory_report().workspace_bytes
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that using it again is seen
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        optimizer.step()
        peak = _status("VmHWM") - before
    return peak, bound


def _unbound(named: list[tuple[str, tuple[int, int]]], rank: int, rank_v: int | None) -> LoRAPre:
    params = [(name, torch.nn.Parameter(torch.empty(shape))) for name, shape in named]
    return LoRAPre(params, rank=rank, rank_v=rank_v)


def _status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
