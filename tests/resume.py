"""Resume from every (ZeRO stage, world size) to every other, once each, in one run of 257 steps.

    python -m tests.resume            # prints the table of docs/results/checkpoints.md

The layouts are visited along a cycle that takes each ordered pair once (a de Bruijn sequence). At every visit a fresh
engine loads the checkpoint of the one before, takes a step and saves; its weights are compared with the dense
reference, which never stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator

from tests.deepspeed.checkpoint_cases import visit_case, write_reference
from tests.distributed.harness import close_pools, run_ranks

LAYOUTS = [(stage, world) for stage in (0, 1, 2, 3) for world in (1, 2, 3, 4)]


def every_pair(count: int) -> list[int]:
    """A walk over ``count`` nodes that takes every ordered pair, also of a node with itself, exactly once."""
    unused = {node: list(range(count)) for node in range(count)}
    stack, walk = [0], []
    while stack:  # Hierholzer's algorithm
        if unused[stack[-1]]:
            stack.append(unused[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk


def some_pairs(count: int, strides: tuple[int, ...] = (5,)) -> list[int]:
    """A walk that comes to each of ``count`` nodes once with each stride, which must have no divisor of ``count``."""
    return [k * stride % count for stride in strides for k in range(count)]


def visits(folder: str, walk: list[int], precision: str = "fp32") -> Iterator[tuple[tuple[int, int], float]]:
    """(stage, world) and the largest relative distance of a parameter to the reference, at each visit of ``walk``."""
    write_reference(folder, len(walk))
    for step, node in enumerate(walk):
        stage, world = LAYOUTS[node]
        found = run_ranks(world, visit_case, stage=stage, precision=precision, folder=folder, step=step)
        yield (stage, world), max(error for error, _ in found)


def main() -> None:
    """Print the largest distance seen after arriving at each layout."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    worst: dict[tuple[int, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for step, (layout, error) in enumerate(visits(folder, every_pair(len(LAYOUTS)))):
            worst[layout] = max(error, worst.get(layout, 0.0))
            print(f"\r{step:3} of 256", end="", file=sys.stderr)
    close_pools()
    print("\n| | 1 rank | 2 ranks | 3 ranks | 4 ranks |\n|---|---|---|---|---|")
    for stage in range(4):
        print(f"| ZeRO-{stage} | " + " | ".join(f"{worst[stage, world]:.1e}" for world in (1, 2, 3, 4)) + " |")


if __name__ == "__main__":
    main()
