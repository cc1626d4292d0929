"""The phases of a step on two ranks that share a matrix."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

# (label, width, whether ranks talk)
PHASES = [
    ("gather A\nand sizes", 1.2, True),
    ("edge rows", 1.0, True),
    ("row blocks: theta,\nY = g A$^T$, B, Z = B$^T$g", 3.0, False),
    ("reduce Z", 1.1, True),
    ("Gram of B\nto its owner", 1.3, True),
    ("owner:\ninverse", 0.9, False),
    ("send\ninverse", 0.9, True),
    ("own columns\nof A", 1.2, False),
    ("Gram of A\nto its owner", 1.3, True),
    ("owner:\nL", 0.7, False),
    ("send L", 0.8, True),
    ("A $\\leftarrow$ L$^{-1}$A\nB $\\leftarrow$ B L", 1.2, False),
]


def draw(out: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(12, 2.3), layout="constrained")
    axes = figure.subplots()
    at = 0.0
    for label, width, together in PHASES:
        one = label.startswith("owner")
        for rank in (1, 0):
            if together and rank == 0:
                continue
            height = 1.9 if together else 0.9
            low = 0.0 if together else float(rank)
            colour = "#ddaa33" if together else "#dddddd" if one and rank == 0 else "#4477aa"
            axes.add_patch(_box(at, low, width, height, colour))
            if not (one and rank == 0):
                axes.text(at + width / 2, low + height / 2, label, ha="center", va="center", fontsize=7)
        at += width
    axes.set(xlim=(0, at), ylim=(-0.05, 2.0), xticks=[], yticks=[0.45, 1.45], yticklabels=["rank 1", "rank 0"])
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(out)


def _box(x: float, y: float, width: float, height: float, colour: str) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.03, y), width - 0.06, height, facecolor=colour, alpha=0.6)
