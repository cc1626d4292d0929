"""A loss, and so a gradient, that is no number at some steps."""

from __future__ import annotations

import importlib


def poison(steps: list[int]) -> None:
    """Multiply the loss of these steps (0 is the first) by NaN; -1 at the end stands for all later ones."""
    loop = importlib.import_module("lorapre_dist.training.run.loop")
    loss = loop.Trainer.loss

    def poisoned(trainer, micro_batch):
        forever = bool(steps) and steps[-1] == -1 and trainer.step >= min(steps[:-1])
        factor = float("nan") if trainer.step in steps or forever else 1.0
        return loss(trainer, micro_batch) * factor

    loop.Trainer.loss = poisoned
