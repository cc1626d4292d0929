"""What runs on the ranks of the tests of 16-bit weights: one training under DeepSpeed's stages and PyTorch's layouts.

One rank alone has the gradient, so many times as large as there are ranks: its mean is exact in bf16, whoever takes it.
The steps of LoRAPreLion are exact, too: a matrix moves by plus or minus lr, whatever the order of sums is.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lorapre_dist
from lorapre_dist.config.param_groups import clean_name
from lorapre_dist.optimizers import OPTIMIZERS

from .cases import Net, build, ds_config, merge, params_of, slopes

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
#: DeepSpeed's layouts: stage and what is changed of the JSON.
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero1 offload": (1, OFFLOAD),
    "zero2 offload": (2, OFFLOAD),
    "zero3 offload": (3, OFFLOAD),
    "zero2 round robin": (2, {"zero_optimization": {"round_robin_gradients": True}}),
}


class Run:
    """A model of bf16 weights and its optimizer under a layout.

    Attributes:
        optimizer: of ours.
    """

    def __init__(self, layout: str, world_size: int, optimizer: str, weights: str) -> None:
        self.layout, self.engine = layout, None
        options = {**params_of(optimizer), "weights": weights}
        if layout in ENGINES:
            stage, changes = ENGINES[layout]
            config = merge(ds_config(stage, "bf16", 1, 0.0, options), changes)
            if weights != "master":
                config["bf16"]["bf16_master_weights_and_grads"] = True
                config["bf16"]["bf16_optimizer_states"] = layout != "zero2"  # the same to ours
            config["optimizer"]["type"] = optimizer
            self.engine = build(config)
            self.model, self.optimizer = self.engine.module, lorapre_dist.deepspeed.base_optimizer(self.engine)
            return
        self.model = Net().to(torch.bfloat16)
        if layout == "fsdp2":
            self.model = fully_shard(self.model, mesh=init_device_mesh("cpu", (world_size,)))
        elif layout == "ddp":
            self.model = torch.nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        self.optimizer = OPTIMIZERS[optimizer](self.model.named_parameters(), **options)

    def train(self, steps: range) -> None:
        size, rank = dist.get_world_size(), dist.get_rank()
        for step in steps:
            factor = size if rank == 0 else 0
            batch = {name: slope * factor for name, slope in slopes(step, 0, 0, 1).items()}
            if self.engine is not None:
                self.engine.backward(self.engine(batch))
                self.engine.step()
                continue
            self.optimizer.zero_grad()
            self.model(batch).backward()
            for p in self.model.parameters():
                if p.requires_grad and p.grad is None:  # as DeepSpeed
                    p.grad = torch.zeros_like(p)
            self.optimizer.step()

    def whole(self) -> dict[str, torch.Tensor]:
        """The model's weights."""
        found = {}
        for name, p in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([p] if hasattr(p, "ds_id") else []):
                value = p.full_tensor() if isinstance(p, DTensor) else p
                found[clean_name(name)] = value.detach().clone()
        return found

    def destroy(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
        dist.barrier()


def digest(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """Of every bit of some bf16 weights, by name."""
    assert all(t.dtype == torch.bfloat16 for t in weights.values())
    return {n: hashlib.blake2b(t.view(torch.int16).numpy().tobytes()).hexdigest()[:16] for n, t in weights.items()}


def bits_case(
    rank: int, world_size: int, *, layouts: list[str], optimizer: str, weights: str, steps: int
) -> dict[str, dict[str, str]]:
    """By layout a digest of the weights after ``steps``."""
    found = {}
    for layout in layouts:
        run = Run(layout, world_size, optimizer, weights)
        try:
            run.train(range(steps))
            found[layout] = digest(run.whole())
        finally:
            run.destroy()
    return found


def visit_case(
    rank: int, world_size: int, *, layout: str, weights: str, folder: str, leg: int
) -> tuple[dict[str, str], list[str]]:
    """Go on from where the leg before left off, take two steps, save: digests of the weights, and what was said.

    ``weights`` of "master" is DeepSpeed's own: fp32 masters of a bf16 model.
    """
    run = Run(layout, world_size, "LoRAPreLion", weights)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if leg and run.engine is not None:
                assert run.engine.load_checkpoint(folder)[0] is not None
            elif leg:
                assert lorapre_dist.checkpoint.load(run.model, run.optimizer, folder) is not None
        run.train(range(2 * leg, 2 * leg + 2))
        if run.engine is not None:
            run.engine.save_checkpoint(folder, tag=f"leg{leg}")
        else:
            lorapre_dist.checkpoint.save(run.model, run.optimizer, folder, f"leg{leg}")
        return digest(run.whole()), [str(w.message) for w in caught if "compensation" in str(w.message)]
    finally:
        run.destroy()
