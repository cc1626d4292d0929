"""Print the table of distances (docs/results/accuracy.md) to the dense reference, measured on real gloo ranks.

python -m tests.equality [--worlds 1 2 3] [--steps 20] [--optimizers LoRAPre LoRAPreMuon ...]
                         [--only_axes | --many 64 | --by_matrices]

For every ZeRO stage, precision and world size: the largest ``||theta - ref|| / ||ref||`` of any parameter after the
steps, over gradient accumulation 1 and 4 with and without clipping; the layouts without DeepSpeed; the core alone, in
fp64 and fp32, on matrices cut at arbitrary places; then the other axes under DeepSpeed. ``--many`` measures on so many
ranks instead, all in fp32; 64 take 12 GiB, and two cores are busy with 5 steps under ZeRO and FSDP2 for 20 minutes.
``--by_matrices`` measures the layouts without DeepSpeed with ``work="matrices"``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from lorapre_dist.optimizers import OPTIMIZERS
from tests.deepspeed import expert_cases, parts_cases, pipeline_cases, test_axes
from tests.deepspeed.cases import equality_case
from tests.deepspeed.test_equality import COMBOS
from tests.distributed.cases import core_case
from tests.distributed.harness import close_pools, run_ranks
from tests.distributed.native_cases import equality_case as native_case
from tests.distributed.test_core import matrices
from tests.distributed.test_native import WORLDS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--only_axes", action="store_true", help="leave out what is data-parallel alone")
    parser.add_argument("--many", type=int, metavar="RANKS", help="instead of all else, a table of so many ranks")
    parser.add_argument("--by_matrices", action="store_true", help="instead of all else, steps by whole matrices")
    args = parser.parse_args()
    if args.by_matrices:
        for optimizer in args.optimizers:
            print(f"\n{optimizer}", flush=True)
            native(optimizer, args.steps, {"work": "matrices"})
        close_pools()
        return
    if args.many is not None:
        if args.many < 4 or args.many % 2:
            parser.error(f"--many {args.many}: HSDP's two dimensions take an even number of ranks, at least 4")
        many(args.many, args.optimizers, args.steps)
        close_pools()
        return
    for optimizer in [] if args.only_axes else args.optimizers:
        print(f"\n{optimizer}\n", flush=True)
        deepspeed(optimizer, args.worlds, args.steps)
        native(optimizer, args.steps)
        core(optimizer, args.steps)
    axes(args.optimizers, args.steps)
    close_pools()


def deepspeed(optimizer: str, worlds: list[int], steps: int) -> None:
    """ZeRO stages and precisions; optimizers beside LoRAPre in fp32 and with clipping alone."""
    print("| DeepSpeed | precision | " + " | ".join(f"N = {n}" for n in worlds) + " |")
    print("|---|---|" + "---|" * len(worlds))
    ours = optimizer == "LoRAPre"
    for stage in range(4):
        for precision in ("fp32", "bf16", "fp16") if ours else ("fp32",):
            cells = []
            for world in worlds:
                arguments = {"stage": stage, "precision": precision, "steps": steps, "optimizer": optimizer}
                arguments["combos"] = COMBOS if ours else [(1, 0.5)]
                results = run_ranks(world, equality_case, timeout=600, **arguments)
                cells.append(max(combo["error"] for result in results for combo in result))
            print(f"| ZeRO-{stage} | {precision} | " + " | ".join(f"{x:.1e}" for x in cells) + " |", flush=True)


def native(optimizer: str, steps: int, options: dict[str, Any] | None = None) -> None:
    """Layouts without DeepSpeed; blocks of 256 bytes, so that no matrix is brought to one rank as a whole."""
    print("\n| without DeepSpeed, fp32 | " + " | ".join(f"N = {n}" for n in (1, 2, 3, 4)) + " |\n|---|---|---|---|---|")
    for layout, worlds in WORLDS.items():
        cells = ["-"] * 4
        for world in worlds:
            arguments = {"layout": layout, "dtype": torch.float32, "steps": steps, "optimizer": optimizer}
            arguments["options"] = options
            arguments["block"] = None if optimizer == "LoRAPre" else 256
            cells[world - 1] = f"{max(r['error'] for r in run_ranks(world, native_case, **arguments)):.1e}"
        print(f"| {layout} | " + " | ".join(cells) + " |", flush=True)


def many(ranks: int, optimizers: list[str], steps: int) -> None:
    """ZeRO's stages, with clipping and a schedule, and PyTorch's layouts; in fp32."""
    print(f"\n| {ranks} ranks, fp32 | {' | '.join(optimizers)} |\n|---|{'---|' * len(optimizers)}")
    for layout in (0, 1, 2, 3, "fsdp2", "hsdp", "fsdp1", "ddp", "tp"):
        cells = []
        for optimizer in optimizers:
            arguments = {"steps": steps, "optimizer": optimizer, "timeout": 3600}
            if isinstance(layout, int):
                zero = {"stage": layout, "precision": "fp32", "combos": [(1, 0.5)]}
                results = [c for r in run_ranks(ranks, equality_case, **zero, **arguments) for c in r]
            else:
                plain = {"layout": layout, "dtype": torch.float32}
                results = run_ranks(ranks, native_case, **plain, **arguments)
            cells.append(f"{max(one['error'] for one in results):.1e}")
        print(f"| {f'ZeRO-{layout}' if isinstance(layout, int) else layout} | {' | '.join(cells)} |", flush=True)


def axes(optimizers: list[str], steps: int) -> None:
    """Axes beside data parallelism under DeepSpeed, in fp32 but for the last, with clipping."""
    stages = {"precision": "fp32", "combos": [(1, 0.5)]}
    rows: list[tuple[str, int, int, Any, dict[str, Any]]] = [
        ("pipeline of 2 stages", 2, 0, pipeline_cases.equality_case, {"stages": 2, **stages}),
        ("pipeline of 4 stages", 4, 0, pipeline_cases.equality_case, {"stages": 4, **stages}),
        ("pipeline of 2 stages", 4, 1, pipeline_cases.equality_case, {"stages": 2, **stages}),
        *(
            ("tensor parallelism, 2 ranks", ranks, stage, parts_cases.equality_case, {"size": 2, "clip": 0.5})
            for ranks, stage in ((2, 0), (4, 1), (4, 2), (4, 3))
        ),
        *(
            ("experts over 2 ranks", 4, stage, expert_cases.equality_case, {"ep_size": 2, "clip": 0.5})
            for stage in (1, 2)
        ),
        ("a Llama split by AutoTP, 2 ranks", 4, 1, parts_cases.autotp_case, {}),
        ("sequences in 2 parts (Ulysses)", 4, 2, test_axes.sequences_case, {"mesh": False}),
        ("second partitions of 2 ranks (hpZ), bf16", 4, 3, test_axes.secondary_case, {}),
    ]
    print(f"\n| axis | ranks | ZeRO | {' | '.join(optimizers)} |\n|---|---|---|{'---|' * len(optimizers)}")
    for name, ranks, stage, case, more in rows:
        cells = []
        for optimizer in optimizers:
            results = run_ranks(ranks, case, stage=stage, steps=steps, optimizer=optimizer, **more)
            found = [one for result in results for one in (result if isinstance(result, list) else [result])]
            cells.append(f"{max(one['error'] for one in found):.1e}")
        print(f"| {name} | {ranks} | {stage} | {' | '.join(cells)} |", flush=True)


def core(optimizer: str, steps: int) -> None:
    """The core alone, on matrices cut at arbitrary places."""
    print("\n| core alone | " + " | ".join(f"N = {n}" for n in (1, 2, 3, 4)) + " |\n|---|---|---|---|---|")
    for dtype, rank in (("float64", 4), ("float32", 2)):
        cells = []
        for world in (1, 2, 3, 4):
            options = {"rank": rank, "lr": 0.001 if optimizer == "LoRAPreLion" else 0.01}
            results = run_ranks(
                world,
                core_case,
                matrices=matrices(world),
                options=options,
                steps=steps,
                dtype=dtype,
                optimizer=optimizer,
                bucket=None if optimizer == "LoRAPre" else 1,
            )
            cells.append(max(e for r in results for name, e in r["errors"].items() if "." not in name))
        print(f"| {dtype} | " + " | ".join(f"{x:.1e}" for x in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
