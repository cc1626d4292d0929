"""Validation loss over 5,000 steps, from ``docs/results/data/five_thousand_steps.csv``."""

from __future__ import annotations

from pathlib import Path

from generate.results import read
from matplotlib.figure import Figure


def draw(out: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    rows = read("five_thousand_steps")
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        axes.plot([int(r["step"]) for r in own], [float(r["loss"]) for r in own], marker="o", label=run)
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend(fontsize=8)
    figure.savefig(out)
