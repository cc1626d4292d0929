"""Validation loss over the learning rate, from ``docs/results/data/quality.csv``."""

from __future__ import annotations

from pathlib import Path

from generate.results import read
from matplotlib.figure import Figure


def draw(out: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, against in zip(figure.subplots(1, 2, sharey=True), ("AdamW", "Muon"), strict=True):
        rows = [row for row in read("quality") if row["compared_with"] == against]
        for name, rank in dict.fromkeys((row["optimizer"], row["rank"]) for row in rows):
            own = [row for row in rows if (row["optimizer"], row["rank"]) == (name, rank)]
            label = name + (f", rank {rank}" if rank else "")
            axes.plot([float(r["lr"]) for r in own], [float(r["loss"]) for r in own], marker="o", label=label)
        axes.set(xscale="log", ylim=(4.3, 4.7), xlabel="learning rate of the matrices", title=f"against {against}")
        axes.legend(fontsize=7)
    figure.supylabel("validation loss")
    figure.savefig(out)
