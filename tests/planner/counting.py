"""What runs on the ranks of the tests of counts: real engines and meshes, on which every optimizer takes one step.

Gradients are made up: what is read of the layout, the state, what is sent and computed does not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import lorapre_dist
from lorapre_dist.core.comm import Comm
from lorapre_dist.integrations.deepspeed.bind import engine_layout
from lorapre_dist.layouts.base import Layout, Piece, Unit
from lorapre_dist.optimizers import OPTIMIZERS, LowRankOptimizer
from lorapre_dist.optimizers.awaiting import building_under_engine

from .cases import build, ds_config

#: Ranks that share the parameters under hybrid sharding, by the number of ranks.
SHARD_SIZE = {1: 1, 2: 1, 3: 3, 4: 2, 16: 8, 64: 16}


def counted_case(
    rank: int,
    world_size: int,
    *,
    layout: str,
    options: dict[str, dict[str, Any]],
    model: str = "llama",
    zero: dict[str, Any] | None = None,
    shard_state: bool = True,
) -> dict[str, Any]:
    """Of every optimizer in ``options``: where its pieces lie, its state, what a step sends and computes."""
    torch.manual_seed(0)
    stepped = _engines if layout.startswith("zero") else _natives
    found = {}
    for optimizer, step in stepped(layout, model, world_size, options, zero or {}, shard_state):
        optimizer.memory_report()  # binds the layout
        counter = FlopCounterMode(display=False)
        with counter:
            step()
        assert optimizer.layout is not None
        found[optimizer.config.optimizer] = {
            "pieces": [_described(p, unit) for unit in optimizer.layout.units for p in unit.pieces],
            "layout": optimizer.layout.name,
            "state": optimizer.memory_report().state_bytes,
            "workspace": optimizer.memory_report().workspace_bytes,
            "sent": {purpose: n for purpose, n in optimizer.comm.bytes.items() if n},
            "flops": counter.get_total_flops(),
        }
    return found


def _described(piece: Piece, unit: Unit) -> dict[str, Any]:
    """A piece in plain values; of the ranks that share its matrix all that counts."""
    peers = piece.peers and {
        "ranks": tuple(dist.get_process_group_ranks(piece.peers.group)),
        "ranges": piece.peers.ranges,
        "columns": piece.peers.columns,
        "index": piece.peers.index,
        "turn": piece.peers.turn,
    }
    own = {name: getattr(piece, name) for name in ("name", "shape", "start", "stop", "columns", "owned", "before")}
    return {**own, "offset": piece.offset, "peers": peers}


Stepped = Iterator[tuple[LowRankOptimizer, Any]]


def _engines(layout: str, model: str, world_size: int, options: Any, zero: Any, _: bool) -> Stepped:
    """On one engine's flat buffers; ZeRO-3 steps them one after the other."""
    config = ds_config(layout, "fp32", zero, {})
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=layout == "zero3"):
        module = build(model)
    engine = lorapre_dist.initialize(model=module, config=config)[0]
    read = engine_layout(engine)
    calls = [[unit.tensor] for unit in read.units] if layout == "zero3" else [[unit.tensor for unit in read.units]]
    for unit in read.units:
        unit.tensor.grad = torch.randn_like(unit.tensor)
    for kind, params in options.items():
        with building_under_engine():
            optimizer = OPTIMIZERS[kind]([unit.tensor for unit in read.units], **params)
        optimizer.bind(_copy(read))

        def step(optimizer: LowRankOptimizer = optimizer) -> None:
            for tensors in calls:
                optimizer.param_groups[0]["params"] = tensors
                optimizer.step()

        yield optimizer, step
    for unit in read.units:
        unit.tensor.grad = None
    engine.destroy()


def _copy(layout: Layout) -> Layout:
    units = [Unit(unit.tensor, unit.group, list(unit.pieces)) for unit in layout.units]
    return replace(layout, units=units, checks_gradients=True)


def _natives(layout: str, model: str, world_size: int, options: Any, _: Any, shard_state: bool) -> Stepped:
    module = wrapped(layout, build(model), world_size)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    for kind, params in options.items():
        optimizer = OPTIMIZERS[kind](module.named_parameters(), shard_state=shard_state, **params)
        optimizer.memory_report()
        optimizer.comm = Comm()
        yield optimizer, optimizer.step


def wrapped(layout: str, model: Any, world_size: int) -> Any:
    """A Llama or Mixtral under a layout of PyTorch's."""
    if layout == "ddp":
        return DistributedDataParallel(model) if world_size > 1 else model
    layers = model.model.layers
    if layout == "fsdp1":
        wrap = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
        for k, layer in enumerate(layers):
            layers[k] = wrap(layer)
        return wrap(model)
    if layout == "tp":
        mesh = init_device_mesh("cpu", (world_size,))
        plan = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        plan |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
        for layer in layers:
            parallelize_module(layer, mesh, plan)
        return model
    shape, names = (world_size,), ("shard",)
    if layout == "hsdp":
        shape, names = (world_size // SHARD_SIZE[world_size], SHARD_SIZE[world_size]), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
