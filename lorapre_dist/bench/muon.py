"""LoRAPreMuon on several ranks: bytes sent for one matrix against the closed form, and time of a step.

    python -m lorapre_dist.bench muon --parts accuracy bytes time

``accuracy``: how far the orthogonalised matrix is from the direct form in fp64, for several spectra, and the range of
its singular values. ``bytes``: 2048 x 5504 in even row shards on 4 ranks, what each rank really sends by purpose, what
the closed form says, and what gathering the matrix on every rank would send. ``time``: Llama-60M's matrices on 2 ranks
against one process, each rank on one core, dealt out whole as under DDP with sharded state, and in row shards as under
FSDP2; all three are timed alternately in one run, and minima over the rounds compared, which other work on the machine
disturbs least; beside them the CPU time of the busier rank, which it hardly disturbs. Ranks are processes of this
machine that speak gloo.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lorapre_dist import reference
from lorapre_dist.config import ConfigError, LoRAPreMuonConfig
from lorapre_dist.core.interval import Peers, column_block
from lorapre_dist.core.linalg import gram
from lorapre_dist.core.rules.muon.cuts import cost
from lorapre_dist.core.rules.muon.newton_schulz import NewtonSchulz, polynomial
from lorapre_dist.core.sizes import SAMPLES, packed_numel
from lorapre_dist.core.workspace import Workspace
from lorapre_dist.layouts import ddp, whole
from lorapre_dist.layouts.base import Layout, Piece, Unit
from lorapre_dist.optimizers import LoRAPreMuon

from .options import bench_parser
from .ranks import spawn
from .shapes import projections

PARTS = ("accuracy", "bytes", "time")
Named = list[tuple[str, torch.Tensor, int]]


def main(argv: list[str]) -> None:
    """Print the tables."""
    parser = bench_parser("muon", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", type=int, nargs=2, default=[2048, 5504], help="matrix of the bytes")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--world_size", type=int, default=4, help="ranks of the bytes")
    parser.add_argument("--model", default="llama-60m", help="matrices of the time")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    if "accuracy" in args.parts:
        print_accuracy()
    if "bytes" in args.parts:
        print_bytes((args.shape[0], args.shape[1]), args.rank, args.world_size)
    if "time" in args.parts:
        print_times(args.model, args.rank, args.rounds)


# accuracy -------------------------------------------------------------------------------------------------------


def print_accuracy() -> None:
    """Distance to the direct form in fp64, relative, and singular values in fp32, of one 512 x 768 matrix each."""
    config = LoRAPreMuonConfig()
    print("512 x 768, five iterations: distance to the direct form in fp64, and singular values of ours in fp32")
    columns = ("direct fp32", "ours fp32", "ours fp16", "direct bf16")
    print(f"  {'singular values':<24} " + " ".join(f"{c:>12}" for c in columns) + f" {'ours lie in':>16}")
    for name, x in spectra(512, 768).items():
        wanted = reference.newton_schulz(x, config)
        ours = through_grams(x.float(), config)
        found = [
            reference.newton_schulz(x.float(), config),
            ours,
            through_grams(x.half(), config),
            reference.newton_schulz(x.bfloat16(), config),
        ]
        errors = [float((y.double() - wanted).norm() / wanted.norm()) for y in found]
        singular = torch.linalg.svdvals(ours)
        print(f"  {name:<24} " + " ".join(f"{e:12.1e}" for e in errors) + f" {singular[-1]:9.3f} .. {singular[0]:.3f}")


def spectra(p: int, q: int) -> dict[str, torch.Tensor]:
    """Matrices of norm 1 by how their singular values fall off."""
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(p, q, generator=generator, dtype=torch.float64)
    U, _, Vt = torch.linalg.svd(gauss, full_matrices=False)
    spiked = torch.full((p,), 1e-2, dtype=torch.float64)
    spiked[:8] = 1
    decades = {k: torch.logspace(0, -k, p, dtype=torch.float64) for k in (3, 6)}
    singular = {
        "1 to 1e-3": decades[3],
        "1 to 1e-6": decades[6],
        "8 of 1, else 1e-2": spiked,
        "8 of 1, else 0": spiked > 0.5,
    }
    found = {"Gaussian": gauss, **{name: (U * s) @ Vt for name, s in singular.items()}}
    return {name: x / x.norm() for name, x in found.items()}


def through_grams(x: torch.Tensor, config: LoRAPreMuonConfig) -> torch.Tensor:
    """A matrix of norm 1 orthogonalised as a step does it, in the matrix's dtype."""
    settings = NewtonSchulz(config.ns_coefficients, config.ns_steps, config.eps)
    for steps in settings.segments():
        x = (polynomial(gram(x, True)[None], steps, settings.coefficients) @ x)[0]
    return x


# bytes ----------------------------------------------------------------------------------------------------------


def print_bytes(shape: tuple[int, int], rank: int, size: int) -> None:
    """Sent bytes of all ranks by purpose, beside the closed form.

    Raises:
        ConfigError: a matrix for which the closed form does not hold.
    """
    p, q = shape
    if p >= q or p % size or 4 * p * q <= Workspace.block:
        raise ConfigError(
            f"--shape {p} {q}: the closed form is of matrices with fewer rows than columns, even row shards on "
            f"{size} ranks and more than {Workspace.block >> 20} MiB"
        )
    measured = sum((Counter(sent) for sent in spawn(size, bytes_rank, shape=shape, rank=rank)), Counter())
    expected, gather = closed_form(shape, rank, size), (size - 1) * shape[0] * shape[1] * 4
    print(f"one step of {shape[0]} x {shape[1]}, rank {rank}, rows on {size} ranks: bytes sent by all ranks together")
    print(f"  {'':<26} {'measured':>13} {'closed form':>13}")
    for purpose in expected:
        print(f"  {purpose:<26} {measured[purpose]:>13,} {expected[purpose]:>13,}")
    orthogonal = [sum(c[p] for p in ORTHOGONAL) for c in (measured, expected)]
    print(f"  {'orthogonalisation':<26} {orthogonal[0]:>13,} {orthogonal[1]:>13,}")
    print(f"  {'all':<26} {sum(measured.values()):>13,} {sum(expected.values()):>13,}")
    segments = NewtonSchulz((0, 0, 0), 5, 0).segments()
    ours, theirs = (cost(form, shape, size, segments, True).flops / 1e9 for form in ("columns", "gather"))
    print(f"  to gather the matrix on all ranks: {gather:,} bytes, and {theirs:.0f} GFlop a rank instead of {ours:.0f}")


ORTHOGONAL = ("move m", "norm", "reduce Gram", "broadcast polynomial", "return update")


def closed_form(shape: tuple[int, int], rank: int, size: int) -> dict[str, int]:
    """Bytes that all ranks together send in a step of a p x q matrix in even row shards, p < q, by purpose (fp32).

    The Gram is p x p, of column blocks; both times that it is taken, its packed half goes to one rank and the
    polynomial comes back.
    """
    p, q = shape
    block = -(-q // size)
    away = size - 1
    columns = [column_block(q, size, k) for k in range(size)]
    moved = p * q - sum((stop - start) * p // size for start, stop in columns)
    packed = packed_numel(p)
    elements = {
        "gather A": away * size * (block * rank + SAMPLES + 2),
        "reduce Z": away * size * block * rank,
        "reduce Gram of B": away * rank**2,
        "send inverse of B": rank**2,
        "reduce Gram of A": away * rank**2,
        "send gauge": rank**2,
        "move m": moved,
        "norm": 2 * away,
        "reduce Gram": 2 * away * packed,
        "broadcast polynomial": 2 * packed,
        "return update": moved,
    }
    return {purpose: 4 * n for purpose, n in elements.items()}


def bytes_rank(index: int, size: int, shape: tuple[int, int], rank: int) -> dict[str, int]:
    """What one rank counts in a step."""
    named = [("q_proj.weight", torch.zeros(shape), 0)]
    optimizer, flat = rows(named, rank, index, size)
    flat.grad = torch.randn(flat.shape, generator=torch.Generator().manual_seed(index))
    optimizer.step()
    return dict(optimizer.comm.bytes)


# time -----------------------------------------------------------------------------------------------------------


def print_times(model: str, rank: int, rounds: int) -> None:
    """Seconds of a step in one process and on two ranks."""
    times = spawn(2, time_rank, model=model, rank=rank, rounds=rounds)[0]
    print(f"a step of {model}'s matrices, rank {rank}, fp32, one thread a rank, {rounds} rounds")
    print(f"  {'':<32} {'median':>8} {'minimum':>9} {'one / this':>11} {'CPU':>9} {'one / this':>11}")
    alone = [min(values) for values in zip(*times["one process"], strict=True)]
    for label, rounds_of in times.items():
        wall, cpu = (list(values) for values in zip(*rounds_of, strict=True))
        cells = statistics.median(wall), min(wall), alone[0] / min(wall), min(cpu), alone[1] / min(cpu)
        print("  {:<32} {:6.2f} s {:7.2f} s {:11.2f} {:7.2f} s {:11.2f}".format(label, *cells))


def time_rank(index: int, size: int, model: str, rank: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds and CPU seconds of each round by contender, the larger of both ranks'; alone, the second rank waits."""
    generator = torch.Generator().manual_seed(0)
    shapes = projections(model)
    grads = {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in shapes}

    def named() -> Named:
        return [(name, torch.nn.Parameter(torch.zeros(shape)), 0) for name, shape in shapes]

    def bound(layout: Layout, given: Named) -> LoRAPreMuon:
        optimizer = LoRAPreMuon([(name, p) for name, p, _ in given], lr=1e-3, rank=rank)
        optimizer.bind(layout)
        for name, p, _ in given:
            p.grad = grads[name]
        return optimizer

    contenders: dict[str, Callable[[], Any]] = {}
    if index == 0:
        alone = named()
        contenders["one process"] = bound(whole.layout(alone), alone).step
    else:
        contenders["one process"] = lambda: None
    dealt = named()
    contenders["2 ranks, dealt out whole (DDP)"] = bound(ddp.layout(dealt, dist.group.WORLD, _all), dealt).step
    optimizer, flat = rows(named(), rank, index, size)
    parts = [grads[name][slice(*column_block(shape[0], size, index))].reshape(-1) for name, shape in shapes]
    flat.grad = torch.cat(parts)
    contenders["2 ranks, row shards (FSDP2)"] = optimizer.step
    times: dict[str, list[list[float]]] = {label: [] for label in contenders}
    for repeat in range(rounds + 1):
        for label, run in contenders.items():
            dist.barrier()
            begin = time.perf_counter(), time.process_time()
            run()
            seconds = torch.tensor([time.perf_counter() - begin[0], time.process_time() - begin[1]])
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if repeat:
                times[label].append(seconds.tolist())
    return times


def _all(name: str, shape: tuple[int, ...], group: int) -> bool:
    return True


def rows(named: Named, rank: int, index: int, size: int) -> tuple[LoRAPreMuon, torch.nn.Parameter]:
    """An optimizer of this rank's whole rows of every matrix, which lie one after another in one flat tensor."""
    optimizer = LoRAPreMuon([(name, torch.nn.Parameter(p)) for name, p, _ in named], lr=1e-3, rank=rank)
    pieces, at = [], 0
    for name, tensor, _ in named:
        p, q = tensor.shape
        ranges = tuple((low * q, high * q) for low, high in (column_block(p, size, k) for k in range(size)))
        start, stop = ranges[index]
        pieces.append(Piece(name, (p, q), start, stop, at, Peers(dist.group.WORLD, ranges, index)))
        at += stop - start
    flat = torch.nn.Parameter(torch.zeros(at))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.bind(Layout("rows", [Unit(flat, 0, pieces)], size))
    return optimizer, flat
