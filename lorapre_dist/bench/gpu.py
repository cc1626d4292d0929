"""A step on a GPU: what the host takes to start it, and the GPU to do it; beside fused AdamW. It needs CUDA.

    python -m lorapre_dist.bench gpu --model llama-60m --ranks 16 128
    python -m lorapre_dist.bench gpu --model llama-1b --ranks 64 512 --block_bytes 2097152

``wall`` is the median time of a step by itself, ``host`` that until the host goes on, ``GPU`` the sum of its kernels'
times, and ``peak`` what a step allocates beside what it keeps. Where wall and host are the same it is starting kernels
that takes the time. ``as a CUDA graph`` is one step that was captured, replayed: the host starts one thing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.config.options import KERNELS
from lorapre_dist.optimizers import OPTIMIZERS

from .launches import parameters
from .options import bench_parser
from .shapes import projections


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = bench_parser("gpu", __doc__)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128], help="of the factors")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="LoRAPre")
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=["auto", "eager"])
    parser.add_argument("--block_bytes", type=int, help="a 32nd of a row block's temporary (default: the optimizer's)")
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args(argv)
    shapes = projections(args.model)
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: PyTorch finds no GPU here; bench step measures on a CPU")
    params = parameters([shape for _, shape in shapes], "cuda")
    named = list(zip([name for name, _ in shapes], params, strict=True))
    elements = sum(p.numel() for p in params)
    print(f"{torch.cuda.get_device_name()}: {args.model}, {len(named)} matrices, {elements / 1e6:.1f}M elements, fp32")
    _print("AdamW, fused", torch.optim.AdamW(params, lr=1e-5, fused=True).step, args.repeats)
    for rank in args.ranks:
        for kernels in args.kernels:
            optimizer = OPTIMIZERS[args.optimizer](named, lr=1e-5, rank=rank, kernels=kernels)
            if args.block_bytes:
                optimizer.workspace = replace(optimizer.workspace, block=args.block_bytes)
            label = f"{args.optimizer}, rank {rank}, kernels {kernels!r}"
            _print(label, optimizer.step, args.repeats)
            _print("  as a CUDA graph", captured(optimizer), args.repeats)
            del optimizer
            torch.cuda.empty_cache()


def _print(label: str, run: Callable[[], Any], repeats: int) -> None:
    run()  # what is made at the first
    wall, host = times(run, repeats)
    device, kernels = busy(run)
    line = f"  {label:<40} wall {wall:8.2f} ms  host {host:8.2f}  GPU {device:8.2f} in {kernels:>6,} kernels"
    print(f"{line}  peak +{peak(run) / 2**20:,.0f} MiB", flush=True)


def times(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median milliseconds until the GPU is done, and until the host goes on."""
    wall, host = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - begin)
    return statistics.median(wall) * 1e3, statistics.median(host) * 1e3


def busy(run: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds of all kernels of a run together, and how many they are."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    return sum(event.self_device_time_total for event in events) / 1e3, sum(event.count for event in events)


def peak(run: Callable[[], Any]) -> int:
    """Bytes by which a run grows what is allocated, at its most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(optimizer: Any) -> Callable[[], None]:
    """One step as a CUDA graph, to be replayed; the optimizer has been stepped, so that all it keeps is there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    replay: Callable[[], None] = graph.replay
    return replay
