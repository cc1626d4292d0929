"""Who holds which elements of three matrices under each layout, from the functions that cut them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lorapre_dist.core.interval import column_block
from lorapre_dist.layouts.geometry.ranges import equal_ranges, holders, owners

SHAPES, RANKS = [(5, 8), (10, 6), (5, 7)], 3


def flat_buffer() -> list[np.ndarray]:
    """ZeRO-1/2, FSDP1: all parameters one behind the other, cut into equal parts."""
    total = sum(p * q for p, q in SHAPES)
    found, at = [], 0
    for p, q in SHAPES:
        ranks = np.empty(p * q)
        for rank, (start, stop) in holders(at, at + p * q, -(-total // RANKS)).items():
            ranks[start:stop] = rank
        found.append(ranks.reshape(p, q))
        at += p * q
    return found


def each_parameter() -> list[np.ndarray]:
    """ZeRO-3: every parameter flattened and cut."""
    found = []
    for p, q in SHAPES:
        ranks = np.empty(p * q)
        for rank, (start, stop) in enumerate(equal_ranges(p * q, RANKS)):
            ranks[start:stop] = rank
        found.append(ranks.reshape(p, q))
    return found


def whole_rows() -> list[np.ndarray]:
    """FSDP2: Shard(0)."""
    return [np.repeat(_blocks(p), q).reshape(p, q) for p, q in SHAPES]


def columns() -> list[np.ndarray]:
    """Tensor parallelism: Shard(1)."""
    return [np.tile(_blocks(q), (p, 1)) for p, q in SHAPES]


def dealt_out() -> list[np.ndarray]:
    """DDP: whole matrices, balanced by elements."""
    owner = owners({str(k): p * q for k, (p, q) in enumerate(SHAPES)}, RANKS)
    return [np.full(shape, owner[str(k)]) for k, shape in enumerate(SHAPES)]


def _blocks(n: int) -> np.ndarray:
    ranks = np.empty(n)
    for rank in range(RANKS):
        ranks[slice(*column_block(n, RANKS, rank))] = rank
    return ranks


LAYOUTS = {
    "ZeRO-1, ZeRO-2, FSDP1": flat_buffer,
    "ZeRO-3": each_parameter,
    "FSDP2": whole_rows,
    "tensor parallel, Shard(1)": columns,
    "DDP, sharded state": dealt_out,
}


def draw(out: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    grid = figure.subplots(len(SHAPES), len(LAYOUTS), gridspec_kw={"height_ratios": [p for p, _ in SHAPES]})
    colours = ListedColormap(["#4477aa", "#ddaa33", "#bb5566"])
    for column, (name, made) in enumerate(LAYOUTS.items()):
        for axes, ranks in zip(grid[:, column], made(), strict=True):
            axes.pcolormesh(ranks[::-1], cmap=colours, vmin=0, vmax=RANKS - 1, edgecolors="white", linewidth=0.6)
            axes.set(aspect="equal", xticks=[], yticks=[], frame_on=False)
        grid[0, column].set_title(name, fontsize=9)
    figure.savefig(out)
