"""What runs on the ranks of the tests of 16-bit weights under PyTorch's layouts."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lorapre_dist.config.param_groups import clean_name, parameter_name
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.optimizers.base import LowRankOptimizer

from .native_cases import OPTIONS, Net, batch_of, full_parameters, wrapped
from .state_cases import ADAMW, HOW

TYPES = {"master": torch.float32, "stochastic": torch.bfloat16, "kahan": torch.bfloat16}
SHAPES = {name: tuple(p.shape) for name, p in Net().named_parameters()}


def built(
    layout: str, world_size: int, optimizer: str, weights: str, other_state: str = "adamw8bit"
) -> tuple[nn.Module, LowRankOptimizer]:
    """A model whose weights are bf16 numbers, of the type that ``weights`` is for, and its optimizer."""
    model: nn.Module = Net().to(torch.bfloat16).to(TYPES[weights])
    if layout != "one device":
        model = wrapped(layout, model, world_size)
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if ADAMW not in n]},
        {"params": [(n, p) for n, p in named if ADAMW in n], "rank": 0},
    ]
    options = {**OPTIONS[optimizer], "weights": weights, "other_state": other_state}
    return model, OPTIMIZERS[optimizer](groups, shard_state=layout != "ddp replicated", **options)


def digest(tensor: torch.Tensor) -> str:
    """Of every bit."""
    plain = tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor.contiguous()
    return hashlib.blake2b(plain.numpy().tobytes()).hexdigest()[:16]


def given_gradients(model: nn.Module, optimizer: LowRankOptimizer, step: int) -> None:
    """Gradients that are the same under every layout, each rank its part."""
    optimizer.bound()
    assert optimizer.layout is not None
    units = {id(unit.tensor): unit for unit in optimizer.layout.units}
    for k, (name, p) in enumerate(model.named_parameters()):
        shape = SHAPES[clean_name(name)]
        full = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + k)).to(p.dtype)
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)
        elif p.shape == full.shape:
            p.grad = full
        elif p.numel():  # FSDP1: a run of the elements, of a stack in several matrices
            first = units[id(p)].pieces[0]
            before = 0
            if parameter_name(first.name) != first.name:
                before = int(first.name.partition("[")[2][:-1]) * torch.Size(first.shape).numel()
            p.grad = full.reshape(-1)[before + first.start :][: p.numel()].view(p.shape)


def bits_case(rank: int, world_size: int, *, layouts: list[str], weights: str, steps: int) -> dict[str, dict[str, str]]:
    """Digests of the weights by layout, after steps of plus or minus lr: fp32 numbers that no order of sums changes."""
    found = {}
    for layout in layouts:
        model, optimizer = built(layout, world_size, "LoRAPreLion", weights)
        for step in range(steps):
            given_gradients(model, optimizer, step)
            optimizer.step()
        whole = full_parameters(layout, model)
        assert all(t.dtype == torch.bfloat16 for t in whole.values())
        found[layout] = {name: digest(tensor) for name, tensor in whole.items()}
    return found


def train(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
    kind = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        model(batch_of(step, kind)).backward()
        optimizer.step()


def snapshot(layout: str, model: nn.Module, optimizer: LowRankOptimizer) -> dict[str, str]:
    """Digests of every whole weight and, on rank 0, of every whole tensor of state."""
    found = {name: digest(tensor) for name, tensor in full_parameters(layout, model).items()}
    for name, entry in optimizer.full_state_dict().items():
        found.update({f"{name}/{key}": digest(torch.as_tensor(value)) for key, value in entry.items()})
    return found


def relay_case(
    rank: int, world_size: int, *, layout: str, weights: str, how: str, folder: str, leg: int
) -> dict[str, Any]:
    """What was found there by the leg before and loaded, what was said, and what is left for the next one."""
    model, optimizer = built(layout, world_size, "LoRAPre", weights)
    load, save = HOW[how]
    found: dict[str, Any] = {}
    if leg:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(model, optimizer, f"{folder}/{leg}")
        found["said"] = [str(w.message) for w in caught if "compensation" in str(w.message)]
        found["loaded"] = snapshot(layout, model, optimizer)
    train(model, optimizer, range(2 * leg, 2 * leg + 2))
    save(model, optimizer, f"{folder}/{leg + 1}")
    found["left"] = snapshot(layout, model, optimizer)
    dist.barrier()
    return found


def moments_case(
    rank: int, world_size: int, *, layout: str, other_state: str, folder: str, leg: int
) -> dict[str, dict[str, Any]]:
    """Rank 0's whole state as the leg before left it, loaded here, and as this leg leaves it."""
    model, optimizer = built(layout, world_size, "LoRAPre", "master", other_state)
    load, save = HOW["ours"]
    found = {}
    if leg:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(model, optimizer, f"{folder}/{leg}")
        found["loaded"] = optimizer.full_state_dict()
    train(model, optimizer, range(2 * leg, 2 * leg + 2))
    save(model, optimizer, f"{folder}/{leg + 1}")
    found["left"] = optimizer.full_state_dict()
    dist.barrier()
    return found
