"""What runs on the ranks of the core's tests: matrices cut at arbitrary places, against the dense reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from lorapre_dist.config import LowRankConfig
from lorapre_dist.layouts.base import Layout, Piece, SubGroups, Unit
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle


def gradient(name: str, shape: tuple[int, int], step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A drifting low-rank signal with heavy-tailed noise; some rows stay without gradient for a while."""
    p, q = shape
    fixed = torch.Generator().manual_seed(sum(map(ord, name)))
    left = torch.randn(p, 3, generator=fixed, dtype=torch.float64)
    right = torch.randn(3, q, generator=fixed, dtype=torch.float64)
    noise = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    g = left @ right * 0.1 + torch.randn(p, q, generator=noise, dtype=torch.float64).pow(3) * 0.05
    if step < 3:
        g[0] = 0
    if name.startswith("silent") and 2 <= step < 30:
        g.zero_()
    return g.to(dtype)


def initial(name: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7 + sum(map(ord, name)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.1


def dense(name: str, shape: tuple[int, int], config: LowRankConfig, steps: int) -> tuple[Any, Any]:
    """theta and state of the reference after ``steps``, in fp64."""
    state = oracle.init_matrix(name, shape, config)
    theta = initial(name, shape)
    for step in range(steps):
        oracle.STEPS[type(config)](theta, gradient(name, shape, step), state, config)
    return theta, state


def relative(x: torch.Tensor, reference_value: torch.Tensor) -> float:
    return float((x.double() - reference_value).norm() / reference_value.norm())


def core_case(
    rank: int,
    world_size: int,
    *,
    matrices: list[tuple[str, tuple[int, int], list[tuple[int, int]]]],
    options: dict[str, Any],
    steps: int,
    dtype: str = "float64",
    bucket: int | None = None,
    optimizer: str = "LoRAPre",
) -> dict[str, Any]:
    """Step matrices cut as told (name, shape, interval of each rank) and compare with the dense reference."""
    kind = getattr(torch, dtype)
    cls = OPTIMIZERS[optimizer]
    config = cls.config_class(**options)
    options = {**options, "target_modules": ".*"}
    stepper = cls([(name, torch.nn.Parameter(torch.empty(shape))) for name, shape, _ in matrices], **options)
    groups = SubGroups(dist.group.WORLD)
    sizes = [ranges[rank][1] - ranges[rank][0] for _, _, ranges in matrices]
    flat = torch.zeros(sum(sizes), dtype=kind, requires_grad=True)
    pieces, at = [], 0
    for (name, shape, ranges), size in zip(matrices, sizes, strict=True):
        start, stop = ranges[rank]
        pieces.append(Piece(name, shape, start, stop, at, groups.peers(ranges)))
        flat.data[at : at + size] = initial(name, shape).reshape(-1)[start:stop]
        at += size
    stepper.param_groups[0]["params"] = [flat]
    stepper.bind(Layout("test", [Unit(flat, 0, pieces)], world_size))
    if bucket:
        stepper.workspace = replace(stepper.workspace, bucket=bucket, block=256)
    for step in range(steps):
        flat.grad = torch.cat(
            [gradient(n, s, step, kind).reshape(-1)[slice(*ranges[rank])] for n, s, ranges in matrices]
        )
        stepper.step()
    errors = {}
    for piece in [p for p in pieces if p.name in stepper.factors()]:
        theta, state = dense(piece.name, piece.shape, config, steps)
        mine = flat.detach()[piece.offset : piece.offset + piece.stop - piece.start]
        want = theta.reshape(-1)[piece.start : piece.stop]
        errors[piece.name] = float((mine.double() - want).norm() / theta.norm())
        held = stepper.factors()[piece.name]
        first = piece.start // piece.shape[1]
        rows = slice(first, first + held["m_B"].shape[0])
        for key in held.keys() & {"m_B", "v_B"}:
            errors[f"{piece.name}.{key}"] = float((held[key].double() - state[key][rows]).norm() / state[key].norm())
    held = {
        (b.piece.name, key, b.state.interval.first_row + k): row.clone()
        for b in stepper.bound()
        if hasattr(b.state, "interval")
        for key, tensor in b.state.tensors().items()
        if key.endswith(("_B", "_row"))
        for k, row in enumerate(tensor)
    }
    return {"errors": errors, "rows": held, "bytes": dict(stepper.comm.bytes), "calls": dict(stepper.comm.calls)}
