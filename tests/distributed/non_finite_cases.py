"""A gradient that is not finite on one rank of a torch-native layout."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lorapre_dist import NonFiniteError
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers import OPTIMIZERS

from .native_cases import OPTIONS, Net, backward, batch_of, full_parameters, wrapped


def everything(layout: str, model: Any, optimizer: Any) -> dict[Any, torch.Tensor]:
    found: dict[Any, torch.Tensor] = dict(full_parameters(layout, model))
    for bound in optimizer.bound():
        found |= {(bound.piece.name, key): tensor.clone() for key, tensor in bound.state.tensors().items()}
        found[bound.piece.name, "step"] = torch.tensor(bound.state.step)
    return found


def skip_case(
    rank: int, world_size: int, *, layout: str, optimizer: str, device_decides: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Good steps with a bad one among them, against good ones alone; then too many bad ones."""
    found = []
    for bad_at in (2, None):
        model = wrapped(layout, Net(dtype), world_size)
        options = {**OPTIONS[optimizer], "max_skipped": 2}
        stepper = OPTIMIZERS[optimizer](model.named_parameters(), shard_state=layout != "ddp replicated", **options)
        stepper._decides_on_device = device_decides
        changed: list[str] = []
        for step in range(5):
            if bad_at is None and step == 2:
                continue
            _backward(model, stepper, step, dtype)
            if step == bad_at:
                poison(model, layout, rank, world_size)
                before = everything(layout, model, stepper)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                stepper.step()
            if step == bad_at:
                after = everything(layout, model, stepper)
                changed = [str(key) for key, tensor in before.items() if not torch.equal(tensor, after[key])]
        found.append((everything(layout, model, stepper), changed, stepper.skipped_steps, stepper, model))
    (mine, changed, skipped, stepper, model), (wanted, *_) = found
    differs = [str(key) for key, tensor in wanted.items() if not torch.equal(tensor, mine[key])]
    return {"changed": changed, "differs": differs, "skipped": skipped, "said": refusal(model, stepper, layout, rank)}


def _backward(model: Any, optimizer: Any, step: int, dtype: torch.dtype) -> None:
    optimizer.zero_grad()
    backward(model, batch_of(step, dtype))


def poison(model: Any, layout: str, rank: int, world_size: int) -> None:
    """One that is not finite for the last rank, and for those that have the same gradient: replicas, or all of DDP."""
    replicas = {"hsdp": 2, "fsdp1 hybrid": 2, "ddp": world_size, "ddp replicated": world_size}.get(layout, 1)
    last = world_size // replicas - 1
    if rank % (last + 1) == last:
        for p in model.parameters():
            if p.grad is not None and local(p.grad).numel():
                local(p.grad).view(-1)[-1] = float("nan")
                return


def refusal(model: Any, optimizer: Any, layout: str, rank: int) -> str:
    try:
        for _ in range(2):
            _backward(model, optimizer, 0, next(model.parameters()).dtype)
            poison(model, layout, rank, torch.distributed.get_world_size())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
    except NonFiniteError as error:
        return str(error)
    return "accepted"
