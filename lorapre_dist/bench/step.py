"""Time of one optimizer step against the least it could take: its bare GEMMs and one AdamW-sized memory pass.

    python -m lorapre_dist.bench step --model llama-60m --rank 128

The bare GEMMs are those with the gradient. What is r x r comes on top of them and is the step's floor with them: Grams
of both factors, their Cholesky factors and inverses, the refresh of A with one, the gauge of A and B with the other.

Beside it a fused AdamW step, and a step of GaLore at rank 128 between its SVDs where galore-torch is installed. All are
measured alternately in one run, on one thread unless told otherwise; one thread's time is its CPU time, so that it does
not count while other work has the core. Medians and minima are compared: other work on a shared machine slows memory
passes more than products, and the minima are the least disturbed rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lorapre_dist.config.options import KERNELS
from lorapre_dist.core.factors import Factors
from lorapre_dist.core.gauge import change
from lorapre_dist.core.linalg import addmm, gram
from lorapre_dist.core.refresh import damped_inverses, gauges, unpacked
from lorapre_dist.core.workspace import Workspace
from lorapre_dist.optimizers import LoRAPre

from .options import bench_parser
from .shapes import projections

#: Of the other contender's projections, whatever ours is.
GALORE_RANK = 128


def main(argv: list[str]) -> None:
    """Print the table; ``--json FILE`` writes the figures."""
    parser = bench_parser("step", __doc__)
    parser.add_argument("--model", default="llama-60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rank_v", type=int)
    parser.add_argument("--variant", default="stable")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="the optimizer's option of that name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block_bytes", type=int, help="size of a row block's temporary (default: the optimizer's)")
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    figures = measure(args)
    print(f"{args.model}, rank {args.rank}, rank_v {figures['rank_v']}, {args.variant}, fp32, {args.device}, ", end="")
    print(f"{args.threads} thread(s), {args.repeats} rounds, kernels {args.kernels!r}")
    print(f"  {'':<42} {'median':>9} {'minimum':>9}")
    for label in ("bare GEMMs", "memory pass", "r x r work", "AdamW step", "GaLore step", "LoRAPre step"):
        if label in figures:
            print(f"  {label:<42} {figures[label][0] * 1e3:6.1f} ms {figures[label][1] * 1e3:6.1f} ms")
    for label, (median, least) in figures["ratios"].items():
        print(f"  {label:<42} {median:8.2f} {least:9.2f}")
    if args.json:
        with open(args.json, "w") as out:
            json.dump(figures, out, indent=1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median and minimum seconds of each contender, and the ratio; keys as printed."""
    device = torch.device(args.device)
    names, shapes = zip(*projections(args.model), strict=True)
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(device)) for s in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(device)
    named = list(zip(names, params, strict=True))
    options = {"lr": 1e-4, "rank": args.rank, "rank_v": args.rank_v, "variant": args.variant, "kernels": args.kernels}
    optimizer = LoRAPre(named, **options)
    if args.block_bytes:
        optimizer.workspace = replace(optimizer.workspace, block=args.block_bytes)
    adamw = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], lr=1e-4, fused=True)
    for p, q in zip(adamw.param_groups[0]["params"], params, strict=True):
        p.grad = q.grad
    rank_v = optimizer.config.resolved_rank_v
    contenders: dict[str, Callable[[], Any]] = {
        "LoRAPre step": optimizer.step,
        "bare GEMMs": _gemms(params, [args.rank, rank_v]),
        "memory pass": _memory_pass(params),
        "r x r work": _square(params, [args.rank, rank_v], optimizer.config.resolved_damping),
        "AdamW step": adamw.step,
    }
    if importlib.util.find_spec("galore_torch"):
        contenders["GaLore step"] = _galore(params)
    clock = time.process_time if device.type == "cpu" and args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {label: [] for label in contenders}
    for repeat in range(args.repeats + 1):
        for label, run in contenders.items():
            synchronize(device)
            begin = clock()
            run()
            synchronize(device)
            if repeat:
                times[label].append(clock() - begin)
    figures: dict[str, Any] = {label: (statistics.median(values), min(values)) for label, values in times.items()}
    step, *parts = (figures[label] for label in ("LoRAPre step", "bare GEMMs", "memory pass", "r x r work"))
    yardsticks = {
        "(bare GEMMs + memory pass)": [sum(part[k] for part in parts[:2]) for k in (0, 1)],
        "(these + r x r work)": [sum(part[k] for part in parts) for k in (0, 1)],
    }
    yardsticks |= {label: figures[label] for label in ("AdamW step", "GaLore step") if label in figures}
    figures["ratios"] = {f"LoRAPre step / {of}": [step[k] / one[k] for k in (0, 1)] for of, one in yardsticks.items()}
    figures["rank_v"] = rank_v
    return figures


def _galore(params: list[torch.nn.Parameter]) -> Callable[[], Any]:
    """GaLore's step at rank 128; its SVDs are in the first step alone, which is not timed."""
    from galore_torch import GaLoreAdamW

    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(copies, params, strict=True):
        p.grad = q.grad
    settings = {"rank": GALORE_RANK, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
    step: Callable[[], Any] = GaLoreAdamW([{"params": copies, **settings}], lr=1e-4, no_deprecation_warning=True).step
    return step


def _gemms(params: list[torch.nn.Parameter], ranks: list[int]) -> Callable[[], None]:
    """``B A``, ``g A^T`` and ``B^T g`` of every matrix and rank: 6 p q r flops each, laid out as the step has them."""
    cases = []
    for p in params:
        for r in ranks:
            B = torch.randn(p.shape[0], r, device=p.device)
            A = torch.randn(r, p.shape[1], device=p.device)
            assert p.grad is not None
            cases.append((p.grad, B, A, torch.empty_like(p), torch.empty_like(B), torch.empty_like(A)))

    def run() -> None:
        for g, B, A, m, Y, Z in cases:
            torch.mm(B, A, out=m)
            torch.mm(g, A.T, out=Y)
            torch.mm(B.T, g, out=Z)

    return run


def _square(params: list[torch.nn.Parameter], ranks: list[int], damping: float) -> Callable[[], None]:
    """What is r x r in a step of ``stable``, in the functions that a step has for it, and in its batches."""
    workspace, device = Workspace(), params[0].device
    every = []
    for r in ranks:
        made = [(torch.randn(1, p, r, device=device), torch.randn(1, r, q, device=device)) for p, q in _shapes(params)]
        every.append([(Factors(B, A), torch.randn_like(A)) for B, A in made])

    def run() -> None:
        for some in every:
            grams = torch.cat([gram(factors.B, wide=False) for factors, _ in some])
            for (factors, Z), inverse in zip(some, damped_inverses(grams, damping, relative=True), strict=True):
                addmm(factors.A, inverse[None], Z, beta=0.95, alpha=0.05)
            grams = torch.cat([gram(factors.A, wide=True) for factors, _ in some])
            for (factors, _), both in zip(some, unpacked(gauges(grams, damping)), strict=True):
                change(factors, [], both[None, 0], both[None, 1], workspace)

    return run


def _shapes(params: list[torch.nn.Parameter]) -> list[tuple[int, int]]:
    return [(p.shape[0], p.shape[1]) for p in params]


def _memory_pass(params: list[torch.nn.Parameter]) -> Callable[[], None]:
    """28 bytes per element, as AdamW moves: four tensors read, three written."""
    buffers = [[torch.randn_like(p) for _ in range(4)] for p in params]

    def run() -> None:
        for theta, grad, m, v in buffers:
            torch.add(theta, grad, out=theta)  # 12 bytes
            m.neg_()  # 8 bytes
            v.neg_()  # 8 bytes

    return run


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
