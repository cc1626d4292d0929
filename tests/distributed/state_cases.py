"""What runs on the ranks of the tests of state: a relay that hands training on from layout to layout."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lorapre_dist import LoRAPre, checkpoint
from lorapre_dist.config import ConfigError
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.optimizers.base import LowRankOptimizer
from tests import oracle

from .native_cases import OPTIONS, Net, backward, batch_of, full_parameters, wrapped

# A matrix under AdamW, split by columns under tensor parallelism.
ADAMW = "o_proj"
STEPS = 3


def dense_path(optimizer: str, steps: int) -> list[dict[str, torch.Tensor]]:
    """Parameters after every ``STEPS`` steps of the reference, in fp64."""
    config = OPTIMIZERS[optimizer].config_class(**OPTIONS[optimizer])
    model = Net(torch.float64)
    theta = {n: p.data for n, p in model.named_parameters()}
    matrices = oracle.each_expert(theta)
    state = oracle.init(matrices, config, lambda n, p: p.ndim == 2 and min(p.shape) > config.rank and ADAMW not in n)
    path = []
    for step in range(steps):
        if step % STEPS == 0:
            path.append({n: p.clone() for n, p in theta.items()})
        model.zero_grad()
        model(batch_of(step, torch.float64)).backward()
        oracle.step(matrices, oracle.each_expert({n: p.grad for n, p in model.named_parameters()}), state, config)
    return [*path, theta]


def built(
    layout: str, world_size: int, optimizer: str = "LoRAPre", empty: bool = True
) -> tuple[nn.Module, LowRankOptimizer]:
    """A stage of a pipeline may have nothing of a group, which torch cannot flatten, unless ``empty`` is False."""
    model = wrapped(layout, Net(torch.float64), world_size)
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if ADAMW not in n]},
        {"params": [(n, p) for n, p in named if ADAMW in n], "rank": 0},
    ]
    groups = [group for group in groups if empty or group["params"]]
    return model, OPTIMIZERS[optimizer](groups, shard_state=layout != "ddp replicated", **OPTIONS[optimizer])


def train(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, batch_of(step, torch.float64))
        optimizer.step()


def distance(layout: str, model: nn.Module, want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative distance of a parameter, and its name."""
    got = full_parameters(layout, model)
    assert got.keys() == want.keys()
    return max((float((got[n] - want[n]).norm() / want[n].norm()), n) for n in want)


def relay_case(
    rank: int, world_size: int, *, layout: str, optimizer: str, how: str, folder: str, leg: int
) -> tuple[float, str]:
    """Go on from what the leg before left in ``folder``, train, leave the same; the distance to the reference."""
    model, stepper = built(layout, world_size, optimizer, empty=how != "flat")
    load, save = HOW[how]
    lr = OPTIONS[optimizer]["lr"]
    if leg:
        load(model, stepper, f"{folder}/{leg}")
        assert {bound.state.step for bound in stepper.bound()} <= {leg * STEPS}
        assert stepper.param_groups[0]["lr"] == lr * (1 + leg), stepper.param_groups[0]["lr"]
        for group in stepper.param_groups:
            group["lr"] = lr
    train(model, stepper, range(leg * STEPS, (leg + 1) * STEPS))
    for group in stepper.param_groups:  # to be found there by the next leg
        group["lr"] = lr * (2 + leg)
    save(model, stepper, f"{folder}/{leg + 1}")
    dist.barrier()
    return distance(layout, model, torch.load(f"{folder}/reference.pt")[leg + 1])


def _save_ours(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    checkpoint.save(model, optimizer, Path(path).parent, Path(path).name)


def _load_ours(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    assert checkpoint.load(model, optimizer, Path(path).parent, Path(path).name) == {}


def _save_dcp(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def _load_dcp(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def _save_full(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    both = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(both, path)
    else:
        assert both == ({}, {})


def _load_full(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    weights, state = torch.load(path, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)


def _save_flat(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    weights, state = get_state_dict(model, optimizer, options=FLAT)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def _load_flat(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    weights, state = get_state_dict(model, optimizer, options=FLAT)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=FLAT)


def _save_plain(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    weights = [local(p).detach() for p in model.parameters()]
    torch.save({"weights": weights, "optimizer": copy.deepcopy(optimizer.state_dict())}, f"{path}.{dist.get_rank()}")


def _load_plain(model: nn.Module, optimizer: LowRankOptimizer, path: str) -> None:
    saved = torch.load(f"{path}.{dist.get_rank()}", weights_only=True)
    with torch.no_grad():
        for p, weight in zip(model.parameters(), saved["weights"], strict=True):
            local(p).copy_(weight)
    optimizer.load_state_dict(saved["optimizer"])


FLAT = StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True)
HOW = {
    "ours": (_load_ours, _save_ours),
    "dcp": (_load_dcp, _save_dcp),
    "full": (_load_full, _save_full),
    "flat": (_load_flat, _save_flat),
    "plain": (_load_plain, _save_plain),
}


def refusal_case(rank: int, world_size: int, *, layout: str, options: dict[str, bool]) -> str:
    """What is said where torch's functions are asked for what a layout cannot do."""
    model, optimizer = built(layout, world_size)
    wanted = StateDictOptions(**options)
    try:
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        if wanted.broadcast_from_rank0:
            set_optimizer_state_dict(model, optimizer, state, options=wanted)
        get_optimizer_state_dict(model, optimizer, options=wanted)
    except (ConfigError, NotImplementedError) as error:
        return str(error)
    return "accepted"


def fresh_case(rank: int, world_size: int, *, folder: str) -> tuple[bool, int, str]:
    """Whether torch's functions leave a fresh state as it is, and what a file of other ranks is refused with."""
    model, optimizer = built("fsdp2", world_size)
    before = {n: {k: t.clone() for k, t in found.items()} for n, found in optimizer.factors().items()}
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, state)
    same = all(torch.equal(t, before[n][k]) for n, found in optimizer.factors().items() for k, t in found.items())
    torch.save(optimizer.state_dict(), f"{folder}/{rank}")
    steps = max(bound.state.step for bound in optimizer.bound())
    _, other = built("ddp", world_size)
    try:
        other.load_state_dict(torch.load(f"{folder}/{rank}", weights_only=True))
    except ConfigError as error:
        return same, steps, str(error)
    return same, steps, "accepted"


def whole_case(rank: int, world_size: int, *, layout: str, path: str, train_first: bool) -> dict[str, torch.Tensor]:
    """The full state by key: after some steps (then it is left in ``path``), or loaded from there."""
    model, optimizer = built(layout, world_size)
    if train_first:
        train(model, optimizer, range(STEPS))
    else:
        optimizer.load_state_dict(torch.load(path, weights_only=True))
    options = StateDictOptions(full_state_dict=True)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    if train_first and rank == 0:
        torch.save(full, path)
    flat = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    return {key: value for key, value in state.items() if key.startswith("state.")}


def columns_case(rank: int, world_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives and bytes of a step of two matrices split by columns, of which the last rank holds fewer."""
    mesh = init_device_mesh("cpu", (world_size,))
    named = [
        (n, nn.Parameter(distribute_tensor(torch.ones(12, q), mesh, [Shard(1)]))) for n, q in (("a", 9), ("b", 14))
    ]
    optimizer = LoRAPre(named, rank=3, target_modules=".*")
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return dict(optimizer.comm.calls), dict(optimizer.comm.bytes)
