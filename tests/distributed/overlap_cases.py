"""What runs on the ranks of the tests of ``overlap``: the same training with it and without, and who waits for what."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from lorapre_dist import ConfigError
from lorapre_dist.bench.delays import Delayed, Virtual
from lorapre_dist.core import exchange
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers import OPTIMIZERS, LowRankOptimizer

from .native_cases import OPTIONS, Net, backward, batch_of, full_parameters, wrapped
from .non_finite_cases import poison

STEPS = 7


def everything(layout: str, model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    found = dict(full_parameters(layout, model))
    for bound in optimizer.bound():
        found |= {f"{bound.piece.name}.{key}": tensor.clone() for key, tensor in bound.state.tensors().items()}
        found[f"{bound.piece.name}.step"] = torch.tensor(bound.state.step)
    return found


def built(
    layout: str, world_size: int, optimizer: str, options: dict[str, Any], overlap: bool, bucket: int | None = None
) -> tuple[Any, LowRankOptimizer]:
    model = wrapped(layout, Net(), world_size)
    settings = {**OPTIONS[optimizer], **options, "overlap": overlap}
    stepper = OPTIMIZERS[optimizer](model.named_parameters(), shard_state=layout != "ddp replicated", **settings)
    if bucket is not None:
        stepper.workspace = replace(stepper.workspace, bucket=bucket, fewest=2)
    return model, stepper


def bits_case(
    rank: int, world_size: int, *, layout: str, optimizers: list[str], options: dict[str, Any], bucket: int | None
) -> dict[str, list[str]]:
    """What differs after steps with a missing gradient, one that is not finite, a copy, and a load; by optimizer."""
    return {
        name: differences(
            *(
                _trained(rank, world_size, layout, built(layout, world_size, name, options, overlap, bucket))
                for overlap in (False, True)
            )
        )
        for name in optimizers
    }


def differences(plain: dict[str, torch.Tensor], overlapped: dict[str, torch.Tensor]) -> list[str]:
    assert plain.keys() == overlapped.keys()
    return [name for name, value in plain.items() if not torch.equal(value, overlapped[name])]


def _trained(rank: int, world_size: int, layout: str, pair: tuple[Any, LowRankOptimizer]) -> dict[str, torch.Tensor]:
    model, optimizer = pair
    overlap, found = optimizer.config.overlap, {}
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        if step == 2 and not layout.startswith("fsdp1"):  # whose parameters cannot be copied
            found = {f"copied {n}": t for n, t in everything(layout, model, copy.deepcopy(optimizer)).items()}
        backward(model, batch_of(step, torch.float32))
        if step == 2:
            for p in [p for n, p in model.named_parameters() if "up_proj" in n and n.endswith("weight")]:
                p.grad = None
        if step == 3:
            poison(model, layout, rank, world_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        if step == 4:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == 5 and rank == 0:
            optimizer.factors()  # one rank may look by itself
    assert optimizer.skipped_steps == 1
    assert (optimizer._background is not None) == overlap
    return found | everything(layout, model, optimizer)


def felt_case(rank: int, world_size: int, *, layout: str, optimizer: str, overlap: bool) -> dict[str, Any]:
    """Delays of one unit that the thread that trains has felt in the third step, and purposes of what it waited for."""
    model, stepper = built(layout, world_size, optimizer, {}, overlap)
    comm = stepper.comm = Delayed(1.0, Virtual())
    here = threading.current_thread()
    started: list[str] = []
    later = Delayed._later

    def noting(self: Delayed, wait: Any) -> Any:
        if threading.current_thread() is here:
            started.append("")
        return later(self, wait)

    Delayed._later = noting
    try:
        for step in range(3):
            stepper.zero_grad()
            model(batch_of(step, torch.float32)).backward()
            before, count = comm.clock.now(), len(started)
            stepper.step()
            felt, issued = comm.clock.now() - before, len(started) - count
        stepper.synchronize()
    finally:
        Delayed._later = later
    return {"felt": felt, "issued": issued, "after": comm.clock.now() - before - felt, "calls": dict(comm.calls)}


def failing_case(rank: int, world_size: int) -> list[str]:
    """What the next looks and steps say when a collective behind training has failed."""
    model, optimizer = built("fsdp2", world_size, "LoRAPre", {}, True)
    said = []

    def train() -> None:
        optimizer.zero_grad()
        model(batch_of(0, torch.float32)).backward()
        optimizer.step()

    train()
    optimizer.synchronize()
    reduce = exchange.reduce

    def broken(*_: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [10.0.0.2]:41")

    exchange.reduce = broken
    try:
        train()  # which has nothing to say of it yet
        for look in (optimizer.state_dict, optimizer.factors, train, optimizer.memory_report):
            try:
                look()
            except RuntimeError as error:
                said.append(str(error))
    finally:
        exchange.reduce = reduce
    dist.barrier()
    return said


def memory_case(rank: int, world_size: int, *, layout: str, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes that are kept from step to step, what the report states, and what a limit below says."""
    model, optimizer = built(layout, world_size, "LoRAPre", options, True)
    for step in range(2):
        optimizer.zero_grad()
        model(batch_of(step, torch.float32)).backward()
        optimizer.step()
    report = optimizer.memory_report()
    kept = {}
    for bound in optimizer.bound():
        for factors in getattr(bound.state, "factors", {}).values():
            for tensor in (factors.ahead.A, factors.ahead.inverse) if factors.ahead is not None else ():
                if tensor is not None:
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    model, refused = built(layout, world_size, "LoRAPre", {**options, "overlap_limit": 100}, True)
    said = []
    for _ in range(2):
        try:
            refused.factors()
        except ConfigError as error:
            said.append(str(error))
    return {"kept": sum(kept.values()), "stated": report.overlap_bytes, "text": str(report), "said": said}


def doors_case(rank: int, world_size: int) -> dict[str, bool]:
    """Whether each look at the state waits for what runs behind training."""
    model, optimizer = built("fsdp2", world_size, "LoRAPre", {}, True)
    optimizer.bound()
    p = next(p for n, p in model.named_parameters() if "q_proj" in n)
    saved = optimizer.state_dict()
    full = optimizer.full_state_dict()
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    doors = {
        "state_dict": optimizer.state_dict,
        "state": lambda: optimizer.state[p],
        "factors": optimizer.factors,
        "bound": optimizer.bound,
        "conditions": optimizer.conditions,
        "memory_report": optimizer.memory_report,
        "full_state_dict": optimizer.full_state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
        "load_full_state_dict": lambda: optimizer.load_full_state_dict(full),
        "deepcopy": lambda: (optimizer.zero_grad(), copy.deepcopy(optimizer)),
        "settle": optimizer.settle,
        "synchronize": optimizer.synchronize,
        "add_param_group": lambda: (optimizer.add_param_group({"params": [("late", frozen)]}), optimizer.bound()),
    }
    found = {}
    for name, door in doors.items():
        optimizer.zero_grad()
        model(batch_of(0, torch.float32)).backward()
        gate = threading.Event()
        optimizer._background.run(gate.wait, (), (), local(p).device)
        optimizer.step()
        pending = optimizer._background._pending[-1]
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        door()
        found[name] = pending.done.is_set()
        timer.join()
    return found
