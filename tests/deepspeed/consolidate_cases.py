"""What runs on the ranks of the test of ``lorapre consolidate``."""

from __future__ import annotations

import torch
import torch.distributed as dist

import lorapre_dist

from .cases import full_parameters
from .checkpoint_cases import engine_of, train_alike


def save_case(
    rank: int, world_size: int, *, stage: int, precision: str, folder: str
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, torch.Tensor]]]:
    """Train a little and save: the fp32 weights, and rows of every ``m_B`` on this rank with the first row's number."""
    engine = engine_of(stage, precision)
    train_alike(engine, range(3))
    engine.save_checkpoint(folder, tag="three", client_state={"note": 1})
    weights = full_parameters(engine)
    rows = {}
    for bound in lorapre_dist.deepspeed.base_optimizer(engine).bound():
        if "m_B" in bound.state.tensors():
            rows[bound.piece.name] = (bound.state.interval.first_row, bound.state.tensors()["m_B"].clone())
    engine.destroy()
    dist.barrier()
    return weights, rows
