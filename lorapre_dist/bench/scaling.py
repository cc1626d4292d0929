"""What a step costs one rank as ranks are added, and whether ranks wait for each other.

    python -m lorapre_dist.bench scaling --model llama-60m --rank 128 --worlds 1 2 4 8 16 64

``simulate``: the CPU time of one rank's step (``--index``) in worlds of any size, without the other ranks. Matrices
lie in even row shards, as under FSDP2 and ZeRO-3. The arithmetic is real, collectives are copies in memory: of an
all-gather this rank's own block for all others, of a reduce-scatter its own part. ``efficiency`` is the time of one
process over N times that of the rank. Beside it the least that is left when all is dealt out evenly but what a rank
must receive (``floor``): the time of one process over N, plus a copy of the ``r q`` numbers of every ``A``. With
``--work matrices`` that is a copy of what it owns (gradients and state) and of its parts of what comes back (changes
and state), and whole matrices are dealt out, of which there may be fewer than ranks.

``chain``: real gloo ranks of this machine with a flat buffer cut into equal parts, as under ZeRO-2: each shares one
matrix with the rank before it and one with the next. Every row block sleeps, and every bucket holds one matrix. If
ranks do not wait in a chain the step takes as long as the busiest rank's own blocks.

``delays``: real gloo ranks again, in row shards, whose collectives take 20 ms longer each (``--late``), between
forwards and backwards that sleep. How many of these delays a training step feels, without ``overlap`` and with it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapre_dist.config import ConfigError
from lorapre_dist.config.options import WORKS
from lorapre_dist.core import batching, owning, regression
from lorapre_dist.core.comm import Comm
from lorapre_dist.core.interval import Peers, RowInterval
from lorapre_dist.layouts import zero12
from lorapre_dist.layouts.base import Layout, Piece, Unit
from lorapre_dist.optimizers import OPTIMIZERS, LowRankOptimizer
from lorapre_dist.optimizers.awaiting import building_under_engine

from . import delays
from .options import bench_parser
from .ranks import spawn
from .shapes import projections

PARTS = ("simulate", "chain", "delays")
Shapes = list[tuple[str, tuple[int, int]]]


def main(argv: list[str]) -> None:
    """Print the tables."""
    parser = bench_parser("scaling", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--rank", type=int, default=128, help="of the factors")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="LoRAPre")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="how ranks divide a step")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--index", type=int, default=0, help="the rank that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that a row block sleeps in chain")
    parser.add_argument("--late", type=float, default=0.02, help="seconds that a collective takes more in delays")
    args = parser.parse_args(argv)
    if min(args.worlds) < 1 or not 0 <= args.index < min([n for n in args.worlds if n > 1] or [1]):
        raise ConfigError(f"--worlds {args.worlds} --index {args.index}: worlds have at least one rank, and that one")
    torch.set_num_threads(1)
    if "simulate" in args.parts:
        print_simulated(args)
    if "chain" in args.parts:
        print_chain(args.delay)
    if "delays" in args.parts:
        delays.print_delays(args.optimizer, args.late)


# simulated worlds -----------------------------------------------------------------------------------------------


def print_simulated(args: argparse.Namespace) -> None:
    """CPU time of one rank's step in every world."""
    shapes = projections(args.model)
    layers = args.layers or len(shapes) // 7
    shapes = shapes[: 7 * layers]
    print(f"{args.optimizer}, {args.model} ({layers} layers, {len(shapes)} matrices), rank {args.rank}: CPU time")
    print(f"of the step of rank {args.index} in row shards, collectives as copies, one thread, least of {args.repeats}")
    print(f"  {'work':<8} {'ranks':>6} {'ms':>10} {'speed-up':>9} {'efficiency':>11} {'floor':>7}")
    alone: float | None = None
    for work, size in [(work, size) for work in args.work for size in args.worlds]:
        if size == 1 and alone is not None:  # whichever way
            continue
        at = min(args.index, size - 1)
        seconds = simulated(args.optimizer, shapes, args.rank, size, at, args.repeats, work)
        alone = alone or seconds * size
        copies = copying(args.optimizer, shapes, args.rank, size, work) if size > 1 else 0.0
        least = 1 / (size * (share(args.optimizer, shapes, args.rank, size, work) + copies / alone))
        figures = f"{seconds * 1e3:>10.1f} {alone / seconds:>9.2f} {alone / seconds / size:>11.2f} {least:>7.2f}"
        print(f"  {work if size > 1 else '':<8} {size:>6} {figures}", flush=True)


def simulated(kind: str, shapes: Shapes, rank: int, size: int, index: int, repeats: int, work: str = "rows") -> float:
    """Least CPU seconds of ``repeats`` steps of rank ``index`` of ``size``."""
    with fake_world(size, index):
        optimizer = row_shards(kind, shapes, rank, size, index, work=work)
        start, times = [tensor.clone() for tensor in _state(optimizer)], []
        for repeat in range(repeats + 1):
            torch._foreach_copy_(_state(optimizer), start)  # what missing peers send is good for one step
            begin = time.process_time()
            optimizer.step()
            times += [time.process_time() - begin] if repeat else []
    return min(times)


def _state(optimizer: LowRankOptimizer) -> list[Tensor]:
    return [tensor for tensors in optimizer.factors().values() for tensor in tensors.values()]


def row_shards(
    kind: str,
    shapes: Shapes,
    rank: int,
    size: int,
    index: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> LowRankOptimizer:
    """An optimizer, with gradients, of one rank's rows of every matrix; its collectives are copies."""
    generator, units, named = torch.Generator().manual_seed(index), [], []
    for name, (p, q) in shapes:
        rows = -(-p // size)
        ranges = tuple((min(p, k * rows) * q, min(p, (k + 1) * rows) * q) for k in range(size))
        start, stop = ranges[index]
        drawn = torch.randn(2, stop - start, generator=generator).to(device, dtype)
        piece = torch.nn.Parameter(drawn[0] * 0.02)
        piece.grad = drawn[1] * 1e-3
        peers = Peers(dist.group.WORLD, ranges, index) if size > 1 else None
        units.append(Unit(piece, 0, [Piece(name, (p, q), start, stop, 0, peers)]))
        named.append((name, piece))
    with building_under_engine():
        optimizer = OPTIMIZERS[kind]([piece for _, piece in named], lr=1e-3, rank=rank, **options)
    optimizer.bind(Layout("row shards", units, size))
    for tensors in optimizer.factors().values():
        for moment in optimizer.config.ranks:
            B = tensors[f"{moment}_B"]
            B.copy_(torch.randn(B.shape, generator=generator) * 1e-3)
    optimizer.comm = Copies()
    return optimizer


class Copies(Comm):
    """Collectives of a rank whose peers do not exist: what they would send is taken to be what it sends."""

    noise = torch.empty(0)

    def all_gather(self, local: Tensor, group: Any, purpose: str) -> Callable[[], Tensor]:
        """This rank's block, as often as there are ranks."""
        out = local.expand(dist.get_world_size(group), -1).contiguous()
        return lambda: out

    def reduce_scatter(self, blocks: Tensor, group: Any, purpose: str) -> Callable[[], Tensor]:
        """This rank's part, as often as there are ranks."""
        size = dist.get_world_size(group)
        out = blocks.view(size, -1)[dist.get_rank(group)] * size
        return lambda: out

    def all_reduce(self, local: Tensor, group: Any, purpose: str, largest: bool = False) -> Callable[[], Tensor]:
        """Itself, as often as there are ranks."""
        size = dist.get_world_size(group)
        return lambda: local.mul_(size)

    def reduce(self, parts: list[tuple[int, Tensor]], group: Any, purpose: str, limit: int) -> Callable[[], None]:
        """Each part as often as there are ranks."""
        torch._foreach_mul_([tensor for _, tensor in parts], dist.get_world_size(group))
        return lambda: None

    def exchange(
        self, sent: Tensor, received: Tensor, counts: list[list[int]], group: Any, purpose: str
    ) -> Callable[[], Tensor]:
        """Small random numbers, what others have of this rank's matrices."""
        if received.device.type != "cpu":  # where there are no numbers
            return lambda: received
        if len(self.noise) < len(received):
            self.noise = torch.randn(len(received), dtype=received.dtype) * 1e-2
        return lambda: self.noise[: len(received)].to(received.dtype)

    def broadcast(self, parts: list[tuple[int, Tensor]], group: Any, purpose: str, limit: int) -> Callable[[], None]:
        """Others' parts as they are."""
        return lambda: None


class fake_world:
    """PyTorch's fake process group of any size, in one process."""

    def __init__(self, size: int, index: int) -> None:
        self.size, self.index = size, index

    def __enter__(self) -> None:
        # PyTorch's own tests use it so; it has no public name.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if self.size > 1:
            dist.init_process_group("fake", rank=self.index, world_size=self.size, store=FakeStore())

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def share(kind: str, shapes: Shapes, rank: int, size: int, work: str) -> float:
    """What part of the arithmetic the rank with most to do has."""
    if work == "rows":
        return 1 / size
    ranks = tuple(OPTIMIZERS[kind].config_class(rank=rank).ranks.values())
    each = [
        owning.flops(batching.outline(RowInterval(name, shape, 0, prod(shape)), None, ranks, 0, 4, (0, 0, 0)))
        for name, shape in shapes
    ]
    load = [0] * size
    for flops, owner in zip(each, owning.owners(each, size), strict=True):
        load[owner] += flops
    return max(load) / sum(load)


def copying(kind: str, shapes: Shapes, rank: int, size: int, work: str) -> float:
    """CPU seconds of copying once what a rank must receive, on average."""
    ranks = OPTIMIZERS[kind].config_class(rank=rank).ranks.values()
    blocks = [r * q for _, (_, q) in shapes for r in ranks]
    if work == "matrices":  # of each owned matrix gradient and factors; of its part of all changes and factors
        blocks = [(2 * p * q + 2 * (p + q) * sum(ranks)) // size for _, (p, q) in shapes]
    tensors, found = [torch.randn(n) for n in blocks], []
    for _ in range(5):
        begin = time.process_time()
        for tensor in tensors:
            tensor.clone()
        found.append(time.process_time() - begin)
    return min(found)


# chains ---------------------------------------------------------------------------------------------------------


def print_chain(delay: float, size: int = 4) -> None:
    """Time of a step whose row blocks sleep, and the busiest rank's own sleep."""
    results = spawn(size, chained, delay=delay)
    wall, own = max(r["wall"] for r in results), max(r["own"] for r in results)
    print(
        f"\nZeRO-2's layout, {size} ranks, {results[0]['matrices']} matrices of one row block, a bucket each; a block"
    )
    print(f"sleeps {delay} s: a step takes {wall:.2f} s, the busiest rank's own blocks {own:.2f} s ({wall / own:.2f})")


def chained(index: int, size: int, delay: float, each: int = 10) -> dict[str, float]:
    """One rank: matrices in a flat buffer that is cut in the middle of some; the step's time and its own sleep."""
    p, q, count = 8, 12, each * size + 1
    placed = [(f"layers.{k}.q_proj.weight", (p, q), k * p * q) for k in range(count)]
    part = -(-count * p * q // size)
    flat = torch.nn.Parameter(torch.randn(min(part, count * p * q - index * part)))
    with building_under_engine():
        optimizer = OPTIMIZERS["LoRAPre"]([flat], lr=1e-3, rank=2)
    units = [zero12.unit(zero12.Buffer(flat, placed, part, dist.group.WORLD), 0)]
    optimizer.bind(Layout("ZeRO-2", units, size, lists_all=False))
    optimizer.workspace = replace(optimizer.workspace, bucket=1, block=p * q * 4)  # no stacks, a block a matrix
    slept = [0.0]
    blocks = regression.blocks

    def slow(work: Any, workspace: Any, cut_only: bool = False) -> Any:
        for block in blocks(work, workspace, cut_only):
            if not cut_only:
                time.sleep(delay)
                slept[0] += delay
            yield block

    regression.blocks = slow
    wall = 0.0
    for _ in range(3):
        flat.grad = torch.randn_like(flat)
        dist.barrier()
        slept[0], begin = 0.0, time.perf_counter()
        optimizer.step()
        wall = time.perf_counter() - begin
    regression.blocks = blocks
    return {"wall": wall, "own": slept[0], "matrices": count}
