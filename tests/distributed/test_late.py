"""Parameters that are frozen for a while, or come late, are stepped as in torch.optim; copies are copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, checkpoint
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.param_groups import clean_name
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers.base import LowRankOptimizer
from tests import oracle
from tests.covering import covering

from .harness import run_ranks
from .native_cases import OPTIONS, Net, batch_of, full_parameters, wrapped

#: A matrix and a vector that are frozen for a while, a matrix that is added with a group of its own, a stack.
FROZEN = ("layers.q_proj.weight", "layers.k_proj.bias", "mlp.experts")
ADDED = "layers.down_proj.weight"
STEPS = 2


def reference(left_out: list[tuple[str, ...]]) -> dict[str, torch.Tensor]:
    """Parameters of the dense reference after ``STEPS`` steps without each of these sets of parameters, in fp64."""
    config = LoRAPreConfig(**OPTIONS["LoRAPre"])
    model = Net(torch.float64)
    theta = {n: p.data for n, p in model.named_parameters()}
    state = oracle.init(oracle.each_expert(theta), config, lambda _, p: p.ndim == 2 and min(p.shape) > config.rank)
    for leg, without in enumerate(left_out):
        for step in range(leg * STEPS, (leg + 1) * STEPS):
            model.zero_grad()
            model(batch_of(step, torch.float64)).backward()
            stepped = {n: p for n, p in model.named_parameters() if n not in without}
            grads = oracle.each_expert({n: p.grad for n, p in stepped.items()})
            oracle.step(oracle.each_expert({n: p.data for n, p in stepped.items()}), grads, state, config)
    return theta


def _freeze(model: nn.Module, frozen: bool, names: tuple[str, ...] = FROZEN) -> None:
    for name, p in model.named_parameters():
        if clean_name(name) in names:
            p.requires_grad_(not frozen)


def _built(
    layout: str, world_size: int, frozen: tuple[str, ...], without: tuple[str, ...] = ()
) -> tuple[nn.Module, LowRankOptimizer]:
    model = Net(torch.float64)
    if layout.startswith("ddp"):  # of which nothing may be frozen afterwards
        _freeze(model, True, frozen)
    model = wrapped(layout, model, world_size) if layout != "one device" else model
    _freeze(model, True, frozen)
    named = [(n, p) for n, p in model.named_parameters() if clean_name(n) not in without]
    return model, LoRAPre(named, shard_state=layout != "ddp replicated", **OPTIONS["LoRAPre"])


def _train(model: nn.Module, optimizer: LowRankOptimizer, leg: int) -> None:
    for step in range(leg * STEPS, (leg + 1) * STEPS):
        model.zero_grad()
        optimizer.zero_grad()
        model(batch_of(step, torch.float64)).backward()
        optimizer.step()


def _error(layout: str, model: nn.Module, left_out: list[tuple[str, ...]]) -> float:
    got, want = full_parameters(layout, model), reference(left_out)
    assert got.keys() == want.keys()
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in want)


def late_case(rank: int, world_size: int, *, layout: str) -> float:
    """Frozen at the first steps and trained later, and a group that is added after steps: distance to the reference."""
    model, optimizer = _built(layout, world_size, FROZEN, without=(ADDED,))
    _train(model, optimizer, 0)
    _freeze(model, False)
    if layout.startswith("ddp"):  # as DDP demands
        model = nn.parallel.DistributedDataParallel(model.module)
    optimizer.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if clean_name(n) == ADDED]})
    _train(model, optimizer, 1)
    _train(model, optimizer, 2)
    return _error(layout, model, [(*FROZEN, ADDED), (), ()])


def resumed_case(rank: int, world_size: int, *, layout: str, how: str, folder: str, then: bool) -> float:
    """Trained (``then``: frozen) and saved, resumed frozen (``then``: trained), and at last trained again."""
    frozen = FROZEN[:2] if how == "checkpoint" and then else FROZEN
    model, optimizer = _built(layout, world_size, frozen if then else ())
    _train(model, optimizer, 0)
    if how == "checkpoint":
        checkpoint.save(model, optimizer, folder, "now")
    else:
        weights, full = [local(p).detach().clone() for p in model.parameters()], optimizer.full_state_dict()
        state = copy.deepcopy(optimizer.state_dict())
    model, optimizer = _built(layout, world_size, () if then else frozen)
    if how == "checkpoint":
        checkpoint.load(model, optimizer, folder, "now")
    else:
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights, strict=True):
                local(p).copy_(weight)
        optimizer.load_state_dict(state) if how == "plain" else optimizer.load_full_state_dict(full)
    _train(model, optimizer, 1)
    _freeze(model, False)
    if layout.startswith("ddp") and not then:
        model = nn.parallel.DistributedDataParallel(model.module)
    _train(model, optimizer, 2)
    return _error(layout, model, [frozen, (), ()] if then else [(), frozen, ()])


def copied_case(rank: int, world_size: int, *, layout: str) -> tuple[bool, bool]:
    """Whether a deep copy of the optimizer has the same state, and whether it is a state of its own."""
    model, optimizer = _built(layout, world_size, ())
    _train(model, optimizer, 0)
    optimizer.zero_grad()  # torch cannot copy gradients of FSDP2
    other = copy.deepcopy(optimizer)
    ours, theirs = optimizer.full_state_dict(), other.full_state_dict()
    same = all(torch.equal(t, theirs[n][k]) for n, e in ours.items() for k, t in e.items() if k != "step")
    _train(model, optimizer, 1)
    after = other.full_state_dict()
    still = all(torch.equal(t, after[n][k]) for n, e in theirs.items() for k, t in e.items() if k != "step")
    for p in (p for group in other.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    other.step()
    dist.barrier()
    return same and bool(ours.keys() == theirs.keys()), still


def wrapped_late_case(rank: int, world_size: int) -> str:
    """What is said where a model is wrapped after the optimizer has stepped."""
    model = Net(torch.float64)
    optimizer = LoRAPre(model.named_parameters(), **OPTIONS["LoRAPre"])
    _train(model, optimizer, 0)
    extra = nn.Linear(16, 16, dtype=torch.float64)
    wrapper = nn.parallel.DistributedDataParallel(extra)
    optimizer.add_param_group({"params": [(f"late_proj.{n}", p) for n, p in wrapper.module.named_parameters()]})
    try:
        optimizer.step()
    except ConfigError as error:
        return str(error)
    return "accepted"


LAYOUTS = [("one device", 1), ("fsdp2", 2), ("ddp", 2), ("ddp replicated", 2), ("tp+fsdp2", 4)]


@pytest.mark.parametrize("layout, world", LAYOUTS)
def test_frozen_parameters_and_groups_that_come_later(layout, world):
    """fp64, so that rounding alone leaves 1e-15."""
    for error in run_ranks(world, late_case, layout=layout):
        assert error <= 1e-10


@pytest.mark.parametrize("where, how", covering(LAYOUTS[:3], ["plain", "checkpoint", "full"], strength=1))
def test_state_of_what_is_frozen_now_is_kept(where, how, tmp_path):
    layout, world = where
    for error in run_ranks(world, resumed_case, layout=layout, how=how, folder=str(tmp_path), then=False):
        assert error <= 1e-10


@pytest.mark.parametrize("where, how", covering(LAYOUTS[:3], ["plain", "checkpoint"], strength=1))
def test_what_was_frozen_when_it_was_saved_begins_with_fresh_state(where, how, tmp_path):
    layout, world = where
    for error in run_ranks(world, resumed_case, layout=layout, how=how, folder=str(tmp_path), then=True):
        assert error <= 1e-10


@pytest.mark.parametrize("layout, world", [("fsdp2", 2), ("ddp", 2), ("tp", 2)])
def test_a_deep_copy_is_a_state_of_its_own(layout, world):
    assert run_ranks(world, copied_case, layout=layout) == [(True, True)] * world


def test_parameters_that_come_under_another_layout_are_refused():
    for text in run_ranks(2, wrapped_late_case):
        assert "came later lie under DDP, sharded state, those before under one device" in text
