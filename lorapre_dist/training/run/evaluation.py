"""Loss on held-out text, the same for every number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from lorapre_dist.training.data.batches import BatchPlan


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per predicted token, and its exponential."""

    loss: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that does not fit a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(engine: Any, held_out: np.ndarray, plan: BatchPlan) -> Evaluation:
    """Mean over all tokens of all ``held_out`` sequences ``(n, seq_len)``, shared out among the ranks.

    Every rank runs the same number of forward passes (ZeRO-3 gathers parameters in each), the last ones on
    repeated sequences that count nothing. Sums are in fp64.
    """
    share = plan.share(len(held_out))
    longest = -(-len(held_out) // plan.world_size)
    total = torch.zeros(2, dtype=torch.float64)
    engine.eval()
    try:
        for start in range(0, longest, plan.micro_batch):
            counted = [i for i in range(share.start + start, share.start + start + plan.micro_batch) if i in share]
            rows = counted + [0] * (plan.micro_batch - len(counted))
            tokens = torch.from_numpy(held_out[rows].astype(np.int64)).to(engine.device)
            losses = sequence_losses(engine(input_ids=tokens).logits, tokens)[: len(counted)]
            total[0] += losses.sum().item()
            total[1] += len(counted) * (held_out.shape[1] - 1)
    finally:
        engine.train()
    total = total.to(engine.device if engine.device.type != "mps" else "cpu")
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return Evaluation((total[0] / total[1]).item())


def sequence_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of each sequence's next-token losses: ``logits (b, s, vocab)``, ``tokens (b, s)`` -> ``(b,)`` fp64."""
    losses = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.double().sum(dim=1)
