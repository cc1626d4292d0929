"""State of a matrix by rank of the factors, from what the settings of each optimizer say that they keep."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lorapre_dist.config import CONFIGS

P, Q = 4096, 11008


def numbers(config: object) -> int:
    """Numbers of state of a P x Q matrix."""
    factors = sum(rank * (P + Q) for rank in config.ranks.values())  # type: ignore[attr-defined]
    return factors + sum({"rms_row": P, "rms_col": Q}[name] for name in config.vectors)  # type: ignore[attr-defined]


def draw(out: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    ranks = [2**k for k in range(3, 12)]
    seen: dict[tuple[float, ...], list[str]] = {}
    for name, config in CONFIGS.items():
        shares = tuple(numbers(config(rank=rank)) / (2 * P * Q) for rank in ranks)
        seen.setdefault(shares, []).append(name)
    for shares, names in seen.items():
        axes.loglog(ranks, shares, marker=".", label=", ".join(names))
    axes.axhline(1, color="grey", linestyle=":")
    axes.text(ranks[0], 1.1, "AdamW", color="grey", fontsize=8)
    axes.set(xlabel="rank", ylabel="state / AdamW's", title=f"a {P} x {Q} matrix", ylim=(None, 2))
    axes.set_xticks(ranks, labels=[str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(out)
