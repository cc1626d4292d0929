"""What runs on the ranks of the tests of what a step keeps: factors in other forms, gradients that are released."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorapre_dist import checkpoint
from lorapre_dist.config import ConfigError
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers import OPTIMIZERS

from .native_cases import OPTIONS, Net, batch_of, full_parameters, wrapped


def trained_case(
    rank: int,
    world_size: int,
    *,
    layout: str | None,
    steps: int,
    options: dict[str, Any],
    optimizer: str = "LoRAPre",
    bucket: int | None = None,
    views: bool = False,
    poisoned: int | None = None,
) -> dict[str, Any]:
    """Train in fp64 under a layout (None: on one device): parameters, and on rank 0 the whole state.

    Also which parameters had been stepped when the last backward pass was over, the purposes of collectives, and how
    many steps were skipped.

    Args:
        bucket: bytes of gradients that go together.
        views: with DDP's gradients as views of its buckets.
        poisoned: a step in which the last rank's gradients of the norm are not finite.
    """
    model: nn.Module = Net(torch.float64)
    if layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views, bucket_cap_mb=0.001)
    elif layout is not None:
        model = wrapped(layout, model, world_size)
    stepper = OPTIMIZERS[optimizer](model.named_parameters(), **{**OPTIONS[optimizer], **options})
    if bucket is not None:
        stepper.workspace = replace(stepper.workspace, bucket=bucket)
    early: set[str] = set()
    for step in range(steps):
        stepper.zero_grad()
        before = {n: local(p).detach().clone() for n, p in model.named_parameters()}
        loss = model(batch_of(step, torch.float64))
        (loss * (torch.nan if step == poisoned and rank == world_size - 1 else 1.0)).backward()
        early = {n.removeprefix("module.") for n, p in model.named_parameters() if not torch.equal(local(p), before[n])}
        kept = [n for n, p in model.named_parameters() if p.grad is not None]
        stepper.step()
    parameters = full_parameters(layout or "", model)
    return {
        "parameters": parameters,
        "state": stepper.full_state_dict(),
        "early": early,
        "kept": kept,
        "calls": dict(stepper.comm.calls),
        "skipped": stepper.skipped_steps,
    }


def accumulation_case(rank: int, world_size: int) -> list[str]:
    """What is said of gradients that cannot be released, and whether FSDP2's own accumulation is one gradient."""
    said = []
    model: Any = wrapped("ddp", Net(), world_size)
    optimizer = OPTIMIZERS["LoRAPre"](model.named_parameters(), **OPTIONS["LoRAPre"], release_gradients=True)
    with model.no_sync():
        model(batch_of(0, torch.float32)).backward()
    try:
        model(batch_of(1, torch.float32)).backward()
    except ConfigError as error:
        said.append(str(error))
    del model, optimizer
    for kind, wrap in {
        "unused": lambda net: nn.parallel.DistributedDataParallel(net, find_unused_parameters=True),
        "fsdp1": lambda net: wrapped("fsdp1", net, world_size),
    }.items():
        net = wrap(Net())
        stepper = OPTIMIZERS["LoRAPre"](net.named_parameters(), **OPTIONS["LoRAPre"], release_gradients=True)
        try:
            net(batch_of(0, torch.float32)).backward()
            stepper.step()
        except ConfigError as error:
            said.append(f"{kind}: {error}")
    return said


def fsdp2_accumulation_case(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Parameters after steps of two backward passes each, of which FSDP2 reduces the second one's sums."""
    model: Any = wrapped("fsdp2", Net(torch.float64), world_size)
    optimizer = OPTIMIZERS["LoRAPre"](model.named_parameters(), **OPTIONS["LoRAPre"], release_gradients=True)
    optimizer.workspace = replace(optimizer.workspace, bucket=1)
    for step in range(3):
        for half in range(2):
            model.set_requires_gradient_sync(half == 1)
            model(batch_of(2 * step + half, torch.float64)).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    return full_parameters("fsdp2", model)


def killed_case(rank: int, world_size: int, *, layout: str, folder: str) -> tuple[list[str], list[str]]:
    """What had been stepped when a backward pass ended in its middle, and what differs after going on without it."""

    def built() -> tuple[Any, Any]:
        model = wrapped(layout, Net(), world_size)
        options = {"state_dtype": "8bit", "other_state": "adamw8bit", "target_modules": ["q_proj", "k_proj"]}
        optimizer = OPTIMIZERS["LoRAPre"](
            model.named_parameters(), **OPTIONS["LoRAPre"], **options, release_gradients=True
        )
        optimizer.workspace = replace(optimizer.workspace, bucket=1)
        return model, optimizer

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            model(batch_of(step, torch.float32)).backward()
            optimizer.step()

    def differing(a: nn.Module, b: nn.Module) -> list[str]:
        pairs = zip(a.named_parameters(), b.parameters(), strict=True)
        return [name for (name, p), q in pairs if not torch.equal(local(p), local(q))]

    def die(_: torch.Tensor) -> None:
        raise KeyboardInterrupt

    (model, optimizer), (killed, dying), (again, resumed) = built(), built(), built()
    train(model, optimizer, range(2))
    checkpoint.save(model, optimizer, folder, "tag")
    checkpoint.load(killed, dying, folder)
    layers = (killed.module if layout == "ddp" else killed).layers
    layers["up_proj"].register_forward_hook(lambda module, given, out: out.register_hook(die) and None)
    with contextlib.suppress(KeyboardInterrupt):
        killed(batch_of(2, torch.float32)).backward()
    early = differing(model, killed)
    checkpoint.load(again, resumed, folder)
    train(model, optimizer, range(2, 5))
    train(again, resumed, range(2, 5))
    return early, differing(model, again)
