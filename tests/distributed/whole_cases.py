"""What runs on the ranks of the tests of steps by whole matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from lorapre_dist import checkpoint
from lorapre_dist.core.rounding import COMPENSATION
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.optimizers.base import LowRankOptimizer

from .native_cases import OPTIONS, Net, batch_of, dense_path, full_parameters, wrapped
from .weights_cases import given_gradients, snapshot

MATRICES = {"work": "matrices"}
TYPES = {"stochastic": torch.bfloat16, "kahan": torch.bfloat16}


def bits_case(
    rank: int, world_size: int, *, layout: str, optimizer: str, options: dict[str, Any], bucket: int | None, steps: int
) -> tuple[list[str], float]:
    """On rank 0 names of the state whose bits are not those of one process with these gradients; how far weights are.

    Each matrix is stepped by itself: products of a stack have other bits, and another process has other stacks.
    """
    states, weights = [], []
    for where in ("one device", layout):
        model: Any = Net().to(TYPES.get(options.get("weights", ""), torch.float32))
        if where != "one device":
            model = wrapped(where, model, world_size)
        of = OPTIMIZERS[optimizer](model.named_parameters(), **{**OPTIONS[optimizer], **MATRICES, **options})
        of.workspace = replace(of.workspace, fewest=10**9, **({"bucket": bucket} if bucket else {}))
        for step in range(steps):
            given_gradients(model, of, step)
            of.step()
        states.append({n: bits for n, bits in snapshot(where, model, of).items() if "/" in n and COMPENSATION not in n})
        weights.append(full_parameters(where, model))
        if where != "one device":
            assert {"gather matrices", "return matrices"} <= set(of.comm.calls) <= {"finite", *_MOVES}
    far = max(float((weights[1][n].double() - w.double()).abs().max() / w.abs().max()) for n, w in weights[0].items())
    return [name for name in states[1] if states[0][name] != states[1][name]], far


_MOVES = ("gather matrices", "return matrices")


def turns_case(rank: int, world_size: int, *, layout: str, optimizer: str, steps: int) -> float:
    """By rows and by matrices in turns; the distance to the reference."""
    model = wrapped(layout, Net(torch.float64), world_size)
    of = OPTIMIZERS[optimizer](model.named_parameters(), **OPTIONS[optimizer])
    for step in range(steps):
        of.param_groups[0]["work"] = ("rows", "matrices")[step % 2]
        of.zero_grad()
        model(batch_of(step, torch.float64)).backward()
        of.step()
    got, want = full_parameters(layout, model), dense_path(steps, optimizer, OPTIONS[optimizer])
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in want)


def skip_case(rank: int, world_size: int, *, layout: str, optimizer: str, on_device: bool) -> list[str]:
    """What a step changes whose gradient is not finite on one rank; and whether the next one changes something."""
    kind: type[LowRankOptimizer] = OPTIMIZERS[optimizer]
    model = wrapped(layout, Net(), world_size)
    of = kind(model.named_parameters(), **OPTIONS[optimizer], **MATRICES)
    of._decides_on_device = on_device
    taken = []
    for step in range(3):
        given_gradients(model, of, step)
        before = snapshot(layout, model, of)
        if step == 1 and rank == world_size - 1:
            for p in model.parameters():
                local = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                if local is not None and local.numel():
                    local.view(-1)[0] = torch.nan
                    break
        of.step()
        taken.append([name for name, bits in snapshot(layout, model, of).items() if bits != before[name]])
    assert of.skipped_steps == 1 and taken[0] and taken[2]
    return taken[1]


def memory_case(rank: int, world_size: int, *, optimizer: str, bucket: int) -> tuple[int, int]:
    """Bytes of the buffers that steps leave in the workspace, and the bound on what they allocate."""
    model = wrapped("fsdp2", Net(), world_size)
    of = OPTIMIZERS[optimizer](model.named_parameters(), **OPTIONS[optimizer], **MATRICES)
    of.workspace = replace(of.workspace, bucket=bucket)
    for step in range(2):
        given_gradients(model, of, step)
        of.step()
    return sum(x.nbytes for x in of.workspace.buffers.values()), of.memory_report().workspace_bytes


def nothing_case(rank: int, world_size: int) -> int:
    """A rank that has no column of a matrix, whose bf16 gradient is of another type than its state; calls of a step."""
    mesh = init_device_mesh("cpu", (world_size,))
    layer = nn.Linear(2, 40, bias=False, dtype=torch.bfloat16)
    layer = parallelize_module(layer, mesh, RowwiseParallel(input_layouts=Replicate()))
    of = OPTIMIZERS["LoRAPre"]({"layers.0.q_proj.weight": layer.weight}.items(), rank=1, **MATRICES)
    layer.weight.grad = torch.ones_like(layer.weight)
    of.step()
    return of.comm.calls["gather matrices"]


def resumed_case(rank: int, world_size: int, *, folder: str) -> set[str]:
    """What is sent by an optimizer of whole matrices that goes on from a checkpoint of rows."""
    for options in ({}, MATRICES):
        model = wrapped("fsdp2", Net(), world_size)
        of = OPTIMIZERS["LoRAPre"](model.named_parameters(), **OPTIONS["LoRAPre"], **options)
        if options:
            checkpoint.load(model, of, folder)
        given_gradients(model, of, 0)
        of.step()
        if not options:
            checkpoint.save(model, of, folder, "step1")
    return set(of.comm.calls)
