"""What runs on the ranks of the model tests."""

from __future__ import annotations

import torch

from lorapre_dist.layouts.base import local
from lorapre_dist.training.engines import models
from lorapre_dist.training.run.settings import Settings


def born_in_shards(
    rank: int, world_size: int, *, settings: Settings
) -> tuple[dict[str, torch.Tensor], dict[str, int], float]:
    """Whole parameters by name, the number of elements held here, and the loss on one batch."""
    model = models.build_model(models.model_config(settings), settings).eval()
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    sizes = {name: local(p).numel() for name, p in model.named_parameters()}
    tokens = torch.arange(32).view(2, 16)
    return whole, sizes, model(input_ids=tokens, labels=tokens).loss.item()
