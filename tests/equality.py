"""Print the README's table of distances to the dense reference, measured on real gloo ranks.

python -m tests.equality [--worlds 1 2 3] [--steps 20]

For every ZeRO stage, precision and world size: the largest ``||theta - ref|| / ||ref||`` of any parameter after the
steps, over gradient accumulation 1 and 4 with and without clipping; the layouts without DeepSpeed; then the core alone,
in fp64 and fp32, on matrices cut at arbitrary places.
"""

from __future__ import annotations

import argparse

import torch

from tests.deepspeed.cases import equality_case
from tests.deepspeed.test_equality import COMBOS
from tests.distributed.cases import core_case
from tests.distributed.harness import close_pools, run_ranks
from tests.distributed.native_cases import equality_case as native_case
from tests.distributed.test_core import matrices
from tests.distributed.test_native import WORLDS


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print("| DeepSpeed | precision | " + " | ".join(f"N = {n}" for n in args.worlds) + " |")
    print("|---|---|" + "---|" * len(args.worlds))
    for stage in range(4):
        for precision in ("fp32", "bf16", "fp16"):
            cells = []
            for world in args.worlds:
                arguments = {"stage": stage, "precision": precision, "combos": COMBOS, "steps": args.steps}
                results = run_ranks(world, equality_case, timeout=600, **arguments)
                cells.append(max(combo["error"] for result in results for combo in result))
            print(f"| ZeRO-{stage} | {precision} | " + " | ".join(f"{x:.1e}" for x in cells) + " |", flush=True)
    print("\n| without DeepSpeed, fp32 | " + " | ".join(f"N = {n}" for n in (1, 2, 3, 4)) + " |\n|---|---|---|---|---|")
    for layout, worlds in WORLDS.items():
        cells = ["-"] * 4
        for world in worlds:
            arguments = {"layout": layout, "dtype": torch.float32, "steps": args.steps}
            cells[world - 1] = f"{max(r['error'] for r in run_ranks(world, native_case, **arguments)):.1e}"
        print(f"| {layout} | " + " | ".join(cells) + " |", flush=True)
    print("\n| core alone | " + " | ".join(f"N = {n}" for n in (1, 2, 3, 4)) + " |\n|---|---|---|---|---|")
    for dtype, rank in (("float64", 4), ("float32", 2)):
        cells = []
        for world in (1, 2, 3, 4):
            options = {"rank": rank, "lr": 0.01}
            results = run_ranks(
                world, core_case, matrices=matrices(world), options=options, steps=args.steps, dtype=dtype
            )
            cells.append(max(e for r in results for name, e in r["errors"].items() if "." not in name))
        print(f"| {dtype} | " + " | ".join(f"{x:.1e}" for x in cells) + " |", flush=True)
    close_pools()


if __name__ == "__main__":
    main()
