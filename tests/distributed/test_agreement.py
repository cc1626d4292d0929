"""Ranks that have built different things say so, in one and the same line; a gradient that one lacks is zero there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, LoRAPreMuon
from lorapre_dist.config.param_groups import clean_name
from lorapre_dist.optimizers.base import LowRankOptimizer
from tests.covering import covering

from .harness import run_ranks
from .native_cases import OPTIONS, Net, batch_of, full_parameters, wrapped

Named = list[tuple[str, nn.Parameter]]


def _optimizer(named: Named, **options: Any) -> LowRankOptimizer:
    return LoRAPre(named, **{**OPTIONS["LoRAPre"], **options})


def _frozen(named: Named) -> LowRankOptimizer:
    next(p for n, p in named if clean_name(n) == "layers.q_proj.weight").requires_grad_(False)
    return _optimizer(named)


def _grouped(named: Named) -> LowRankOptimizer:
    return LoRAPre([{"params": named[:4]}, {"params": named[4:], "lr": 0.5}], **OPTIONS["LoRAPre"])


#: What one rank may do otherwise, and how the line names it.
OTHERWISE: dict[str, tuple[Callable[[Named], LowRankOptimizer], str]] = {
    "lr": (lambda n: _optimizer(n, lr=0.02), "lr of parameter group 0: "),
    "seed": (lambda n: _optimizer(n, seed=1), "seed of parameter group 0: "),
    "init_std": (lambda n: _optimizer(n, init_std=0.1), "init_std of parameter group 0: "),
    "damping": (lambda n: _optimizer(n, damping=0.1), "damping of parameter group 0: "),
    "rank": (lambda n: _optimizer(n, rank=3), "rank of parameter group 0: "),
    "variant": (lambda n: _optimizer(n, variant="paper"), "variant of parameter group 0: "),
    "targets": (lambda n: _optimizer(n, target_modules=["q_proj"]), "target_modules of parameter group 0: "),
    "shard_state": (lambda n: _optimizer(n, shard_state=False), "shard_state: "),
    "class": (lambda n: LoRAPreMuon(n, lr=0.01, rank=2), "the optimizer: "),
    "groups": (_grouped, "the number of parameter groups: "),
    "order": (lambda n: _optimizer(n[::-1]), "parameter number 0: "),
    "missing": (lambda n: _optimizer(n[1:]), "missing on rank "),
    "frozen": (_frozen, "frozen"),
}


#: Under layouts that are found and compared in the same way as others, these are enough.
FEW = ("rank", "class", "order", "frozen")


def disagreement_case(
    rank: int, world_size: int, *, layouts: list[str], exhaustive: bool
) -> dict[tuple[str, str], str]:
    """What is said under each layout where the last rank does one thing otherwise."""
    said = {}
    for layout in layouts:
        for name in OTHERWISE if exhaustive or layout in ("fsdp2", "ddp") else FEW:
            build, _ = OTHERWISE[name]
            model = wrapped(layout, Net(), world_size)
            named = list(model.named_parameters())
            optimizer = build(named) if rank == world_size - 1 else _optimizer(named)
            try:
                optimizer.bound()
                said[layout, name] = "accepted"
            except ConfigError as error:
                said[layout, name] = str(error)
        model = wrapped(layout, Net(), world_size)
        _optimizer(list(model.named_parameters())).bound()  # nothing is left behind
    return said


LACKING = "layers.up_proj.weight"


def lacking_case(rank: int, world_size: int, *, layout: str, optimizer: str) -> tuple[bool, bool, int]:
    """Whether a gradient that is None on one rank is a zero one, and changes nothing where it is None on all."""
    ends = []
    for missing in (False, True):
        model = wrapped(layout, Net(torch.float64), world_size)
        stepper = (LoRAPre if optimizer == "LoRAPre" else LoRAPreMuon)(model.named_parameters(), **OPTIONS[optimizer])
        for step in range(3):
            _backward(model, stepper, step)
            if step == 1 and rank == world_size - 1:
                for name, p in model.named_parameters():
                    if clean_name(name) in (LACKING, "norm.weight"):
                        p.grad = None if missing or p.grad is None else torch.zeros_like(p.grad)
            stepper.step()
        ends.append(full_parameters(layout, model))
    same = all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    _backward(model, stepper, 3)
    for name, p in model.named_parameters():
        if clean_name(name) == LACKING:
            p.grad = None
    stepper.step()
    after = full_parameters(layout, model)
    still = all(torch.equal(ends[1][n], after[n]) == (n == LACKING) for n in after)
    before = stepper.comm.calls["finite"]
    stepper.zero_grad()
    stepper.step()  # without any gradient
    unmoved = full_parameters(layout, model)
    still = still and all(torch.equal(after[n], unmoved[n]) for n in after)
    return same, still, stepper.comm.calls["finite"] - before


def _backward(model: nn.Module, optimizer: LowRankOptimizer, step: int) -> None:
    optimizer.zero_grad()
    model(batch_of(step, torch.float64)).backward()


@pytest.mark.parametrize(
    "world, layouts", [(2, ["fsdp2", "fsdp1", "ddp", "ddp replicated"]), (4, ["hsdp", "tp+fsdp2"])]
)
def test_ranks_that_disagree_all_raise_the_same_line(world, layouts, exhaustive):
    first, *others = run_ranks(world, disagreement_case, layouts=layouts, exhaustive=exhaustive)
    assert all(said == first for said in others)
    for (layout, name), line in first.items():
        _, words = OTHERWISE[name]
        assert line.startswith("the ranks do not agree on ") and words in line, (layout, name, line)
        assert f"on rank {world - 1}" in line and "\n" not in line, (layout, name, line)
        assert ("on rank 0;" if world == 2 else "on ranks 0-2") in line, (layout, name, line)


LACKING_LAYOUTS = [("fsdp2", 3), ("fsdp1", 2), ("ddp", 3), ("tp", 2), ("tp+fsdp2", 4), ("hsdp", 4)]


@pytest.mark.parametrize("where, optimizer", covering(LACKING_LAYOUTS, ["LoRAPre", "LoRAPreMuon"], strength=1))
def test_a_gradient_that_one_rank_lacks_is_zero_there(where, optimizer):
    """And one that all lack leaves the parameter as it is, as in torch.optim, without a further collective."""
    layout, world = where
    for same, still, asked in run_ranks(world, lacking_case, layout=layout, optimizer=optimizer):
        assert same and still and asked == (2 if layout == "tp+fsdp2" else 1)
