"""The loss curve of a run."""

from __future__ import annotations

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


def running_mean(values: tuple[float, ...], decay: float = 0.95) -> list[float]:
    """Exponential running mean without the start's bias."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(total / weight)
    return result
