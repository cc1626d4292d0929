"""Time of a step on a 3-D parameter of experts, as one stack and matrix by matrix.

    python -m lorapre_dist.bench experts --experts 64 --shape 256 128 --rank 16

Both are measured alternately in one run, on one thread unless told otherwise; medians and minima are compared.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

from lorapre_dist.core import batching
from lorapre_dist.core.factors import Matrix
from lorapre_dist.optimizers import LoRAPre

from .options import bench_parser
from .step import synchronize

CASES = [(256, (64, 64), 8), (64, (128, 96), 8), (64, (256, 128), 16)]


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = bench_parser("experts", __doc__)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--shape", type=int, nargs=2, default=(256, 128))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    cases = [(args.experts, tuple(args.shape), args.rank)] if args.experts else CASES
    print(f"a step on experts, fp32, {args.device}, {args.threads} thread(s), {args.repeats} rounds; us an expert")
    labels = ("experts", "shape", "rank", "stack of", "stacked", "one by one", "ratio of medians", "of minima")
    print("  " + "  ".join(f"{label:>9}" for label in labels))
    for experts, shape, rank in cases:
        size, stacked, alone = measure(experts, shape, rank, torch.device(args.device), args.repeats)
        median, least = (statistics.median(alone) / statistics.median(stacked), min(alone) / min(stacked))
        stack, single = (f"{statistics.median(found) / experts * 1e6:.0f}" for found in (stacked, alone))
        cells = (experts, "x".join(map(str, shape)), rank, size, stack, single, f"{median:.2f}", f"{least:.2f}")
        print("  " + "  ".join(f"{cell:>{max(9, len(label))}}" for cell, label in zip(cells, labels, strict=True)))


def measure(
    experts: int, shape: tuple[int, int], rank: int, device: torch.device, repeats: int
) -> tuple[int, list[float], list[float]]:
    """Matrices in the largest stack, and seconds of each round: stacked, and one by one."""
    generator, optimizers = torch.Generator().manual_seed(0), []
    for stacked in (True, False):
        parameter = torch.nn.Parameter((torch.randn(experts, *shape, generator=generator) * 0.02).to(device))
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(device)
        optimizer = LoRAPre([("experts.up_proj", parameter)], lr=1e-4, rank=rank)
        if not stacked:  # a block of one matrix
            limit = optimizer.workspace.block_on(device.type) // optimizer.workspace.block
            block = parameter[0].numel() * parameter.element_size() // limit
            optimizer.workspace = replace(optimizer.workspace, block=block)
        optimizers.append(optimizer)
    matrices = [bound.state for bound in optimizers[0].bound() if isinstance(bound.state, Matrix)]
    limits = batching.Limits.of(optimizers[0].workspace, device.type)
    waves = batching.plan([matrix.outline for matrix in matrices], limits)
    found = [len(run) for wave in waves for bucket in wave for run in bucket]
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 2):
        for optimizer, seconds in zip(optimizers, times, strict=True):
            synchronize(device)
            begin = time.perf_counter()
            optimizer.step()
            synchronize(device)
            if repeat > 1:
                seconds.append(time.perf_counter() - begin)
    return max(found), times[0], times[1]
