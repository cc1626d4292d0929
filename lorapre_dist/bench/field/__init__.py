"""The whole field: every optimizer on the same tokens from the same weights, each at its best learning rate.

    python -m lorapre_dist.bench field --out runs/field
    python -m lorapre_dist.bench field --out runs/field --report

Only the optimizer of the attention and MLP matrices differs between rows; AdamW at lr 0.01 takes the rest in each, and
gradients are clipped to norm 1. Short runs look for a contender's learning rate, beyond those it begins with while the
best is the lowest or the highest; long ones with several seeds are then done with it. ``OUT/runs.jsonl`` has a line for
every run, and no run is done again: a command that was stopped goes on where it was, and one with more seeds, steps or
contenders adds to what is there.
"""

from __future__ import annotations


def main(argv: list[str]) -> None:
    """The command ``bench field``."""
    from .command import main as run

    run(argv, __doc__)
