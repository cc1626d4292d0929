"""The loss curve of a run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLOT_FILE = "loss.png"


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss (faint, and its running mean) and evaluation loss over steps into ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training")
        axes.plot(steps, running_mean(losses), color="tab:blue", label="training, running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", markersize=4, label=f"held out (last {losses[-1]:.3f})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def running_mean(values: Sequence[float], window: int | None = None) -> list[float]:
    """Mean over as many values before as after each one, so that it does not lag behind a falling loss.

    Args:
        window: values on either side at most (default: a fiftieth of all); fewer towards both ends.
    """
    window = max(1, len(values) // 50) if window is None else window
    sums = [0.0, *itertools.accumulate(values)]
    reach = [min(k, len(values) - 1 - k, window) for k in range(len(values))]
    return [(sums[k + r + 1] - sums[k - r]) / (2 * r + 1) for k, r in enumerate(reach)]
