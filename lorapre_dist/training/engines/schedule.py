"""Learning-rate schedule: linear warm-up, then cosine decay to a tenth."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

FINAL_FRACTION = 0.1


def lr_fraction(step: int, warmup_steps: int, max_steps: int) -> float:
    """Fraction of the peak lr at optimizer step ``step``, counted from 0.

    ``(step + 1) / warmup_steps`` while warming up, then a cosine from 1 to 0.1 at ``max_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return FINAL_FRACTION + (1.0 - FINAL_FRACTION) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduler_factory(warmup_steps: int, max_steps: int) -> Callable[[Optimizer], LambdaLR]:
    """For DeepSpeed's ``lr_scheduler`` argument: it calls this with the optimizer it has built."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: lr_fraction(step, warmup_steps, max_steps))
