"""What runs on the ranks of the torch-native layouts' tests: a small model with a real loss, and the reference."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lorapre_dist import LoRAPre
from lorapre_dist.config import ConfigError
from lorapre_dist.core.comm import all_ranks
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle
from tests.shapes import projections

# Odd shapes; with three or four ranks some hold one row, or nothing, of the small ones.
SHAPES = {"q_proj": (24, 12), "up_proj": (37, 12), "down_proj": (12, 37), "o_proj": (7, 13), "k_proj": (3, 40)}
EXPERTS = (5, 10, 8)  # of which FSDP2 splits even sides alone, but for the first
OPTIONS: dict[str, dict[str, Any]] = {
    "LoRAPre": {"lr": 0.01, "rank": 2, "weight_decay": 0.05, "betas": (0.9, 0.99)},
    "LoRAPreMuon": {"lr": 0.01, "rank": 2, "weight_decay": 0.05, "adamw_lr": 0.005, "adamw_weight_decay": 0.01},
    "LoRAPreSGD": {"lr": 0.01, "rank": 2, "weight_decay": 0.05, "nesterov": True},
    "LoRAPreLion": {"lr": 0.002, "rank": 2, "weight_decay": 0.05},
    "LoRAPreAdafactor": {"lr": 0.01, "rank": 2, "weight_decay": 0.05, "betas": (0.9, 0.99)},
}


class Experts(nn.Module):
    """A stack of matrices; under expert parallelism each rank sees the loss of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        experts = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(9)) / 8
        self.experts = nn.Parameter(experts.to(dtype))

    def forward(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        experts = self.experts
        if isinstance(experts, DTensor):
            mesh = experts.device_mesh
            slope, experts = slope.chunk(mesh.size(), 1)[mesh.get_local_rank()], experts.to_local()
        out = torch.einsum("epq,bq->bep", experts, x)
        return ((out * slope) + 0.05 * out.square()).sum((1, 2))


class Net(nn.Module):
    """Linear layers, each seen by the loss alone; weights and batch are the same on every rank."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for k, (name, (p, q)) in enumerate(SHAPES.items()):
            generator = torch.Generator().manual_seed(k)
            layer = nn.Linear(q, p, dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(p, q, generator=generator) / 8)
                layer.bias.copy_(torch.randn(p, generator=generator) / 8)
            self.layers[name] = layer
        self.norm = nn.LayerNorm(5, dtype=dtype)
        self.mlp = Experts(dtype)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total = self.norm(batch["norm"]).square().sum()
        total = total + self.mlp(batch["experts"], batch["experts.slope"]).sum()
        for name, layer in self.layers.items():
            out = layer(batch[name])
            out = out.full_tensor() if isinstance(out, DTensor) else out
            total = total + (out * batch[f"{name}.slope"]).sum() + 0.05 * out.square().sum()
        return total


def batch_of(step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    batch = {"norm": torch.randn(3, 5, generator=generator)}
    batch["experts"] = torch.randn(6, EXPERTS[2], generator=generator)
    batch["experts.slope"] = torch.randn(6, *EXPERTS[:2], generator=generator)
    for name, (p, q) in SHAPES.items():
        batch[name] = torch.randn(6, q, generator=generator)
        batch[f"{name}.slope"] = torch.randn(6, p, generator=generator)
    return {name: value.to(dtype) for name, value in batch.items()}


class Stage(Net):
    """Some of the layers: a stage of a pipeline, which hands on the batch and, in the last column, each one's loss."""

    def __init__(self, dtype: torch.dtype, index: int, count: int) -> None:
        super().__init__(dtype)
        for k, name in enumerate(SHAPES):
            if k % count != index:
                del self.layers[name]
        if index:
            del self.norm
        if index != count - 1:
            del self.mlp
        self.index, self.last = index, index == count - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = dict(zip(_WIDTHS, x.split([*_WIDTHS.values(), 1], 1), strict=False))
        total = x[:, -1]
        if hasattr(self, "norm"):
            total = total + self.norm(parts["norm"]).square().sum(1) * parts["mask"][:, 0]
        if hasattr(self, "mlp"):
            slope = parts["experts.slope"].unflatten(1, EXPERTS[:2])
            total = total + self.mlp(parts["experts"], slope)
        for name, layer in self.layers.items():
            out = layer(parts[name])
            total = total + (out * parts[f"{name}.slope"]).sum(1) + 0.05 * out.square().sum(1)
        return torch.cat([x[:, :-1], total[:, None]], 1)


_WIDTHS = {"norm": 5, "mask": 1, "experts": EXPERTS[2], "experts.slope": EXPERTS[0] * EXPERTS[1]}
for _name, (_p, _q) in SHAPES.items():
    _WIDTHS |= {_name: _q, f"{_name}.slope": _p}


def in_rows(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch as one row each; the norm sees the first ones alone."""
    rows, seen = len(batch["experts"]), len(batch["norm"])
    mask = torch.zeros(rows, 1).index_fill_(0, torch.arange(seen), 1.0)
    norm = torch.cat([batch["norm"], batch["norm"].new_zeros(rows - seen, 5)])
    parts = {**batch, "norm": norm, "mask": mask.to(norm), "experts.slope": batch["experts.slope"].flatten(1)}
    return torch.cat([*(parts[name] for name in _WIDTHS), norm.new_zeros(rows, 1)], 1)


def backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """The gradients of a batch; of a pipeline's stage in three micro-batches, or of this rank's part."""
    if hasattr(model, "context"):
        index, count = model.context
        (model({name: part[index::count] for name, part in batch.items()}) * count).backward()
        return
    if not isinstance(model, Stage):
        model(batch).backward()
        return
    given = (in_rows(batch),) if model.index == 0 else ()
    target = {"target": torch.zeros(len(batch["experts"]))} if model.last else {}
    model.schedule.step(*given, **target)


def staged(mesh: DeviceMesh, dtype: torch.dtype) -> Stage:
    """This rank's stage of a pipeline along the dimension "pp" of a mesh, with what is inside it on the others."""
    count, index = mesh["pp"].size(), mesh.get_local_rank("pp")
    model: Any = Stage(dtype, index, count)
    if "tp" in mesh.mesh_dim_names:
        model = tensor_parallel(model, mesh["tp"])
    if "dp" in mesh.mesh_dim_names:
        shard(model, mesh["dp"])
    stage = PipelineStage(model, index, count, torch.device("cpu"), group=mesh.get_group("pp"))
    model.schedule = Schedule1F1B(stage, 3, loss_fn=lambda out, _: out[:, -1].sum(), scale_grads=False)
    return model


_references: dict[str, dict[str, torch.Tensor]] = {}


def dense_path(steps: int, optimizer: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The reference's parameters after ``steps``, by name; a rank that has computed them keeps them."""
    key = repr((steps, optimizer, options))
    if key not in _references:
        _references[key] = _dense_path(steps, optimizer, options)
    return _references[key]


def _dense_path(steps: int, optimizer: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Autograd in fp64 and the reference optimizer."""
    config = OPTIMIZERS[optimizer].config_class(**options)
    model = Net(torch.float64)
    theta = {n: p.data for n, p in model.named_parameters()}
    matrices = oracle.each_expert(theta)
    state = oracle.init(matrices, config, lambda _, p: p.ndim == 2 and min(p.shape) > config.rank)
    for step in range(steps):
        model.zero_grad()
        model(batch_of(step, torch.float64)).backward()
        oracle.step(matrices, oracle.each_expert({n: p.grad for n, p in model.named_parameters()}), state, config)
    return theta


def mesh_of(world_size: int, *names: str) -> DeviceMesh:
    shape = (world_size,) if len(names) == 1 else (2, world_size // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def tensor_parallel(model: Net, mesh: DeviceMesh) -> Net:
    rows, columns = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(
        model, mesh, {f"layers.{n}": columns if n in ("o_proj", "down_proj") else rows for n in model.layers}
    )


def expert_parallel(model: Net, world_size: int, dim: int) -> Net:
    """Experts over two ranks, and each rank's split along a dimension over the others; all else over all ranks."""
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("efsdp", "ep"))
    experts = distribute_tensor(model.mlp.experts.detach(), mesh["ep"], [Shard(0)])
    model.mlp.experts = nn.Parameter(experts)
    fully_shard(model.mlp, mesh=mesh["efsdp"], shard_placement_fn=lambda _: Shard(dim))
    return shard(model, mesh_of(world_size, "dp"))


def shard(model: Net, mesh: DeviceMesh, **options: Any) -> Net:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def wrapped(layout: str, model: Net, world_size: int) -> nn.Module:
    """The model under a layout."""
    if layout == "fsdp2":
        return shard(model, mesh_of(world_size, "dp"))
    if layout == "hsdp":
        return shard(model, mesh_of(world_size, "replicate", "shard"))
    if layout == "tp":
        return tensor_parallel(model, mesh_of(world_size, "tp"))
    if layout == "tp+fsdp2":
        mesh = mesh_of(world_size, "dp", "tp")
        return shard(tensor_parallel(model, mesh["tp"]), mesh["dp"])
    if layout == "cp+fsdp2":  # the parameters lie over both, as torchtitan has them
        mesh = mesh_of(world_size, "dp", "cp")
        model = shard(model, mesh["dp", "cp"]._flatten("dp_cp"))
        model.context = mesh.get_local_rank("cp"), mesh["cp"].size()
        return model
    if layout.startswith("ep+fsdp2"):
        return expert_parallel(model, world_size, int(layout[-1]))
    if layout in ("pp", "pp+fsdp2", "tp+pp+fsdp2"):
        names = ("pp", "dp", "tp")[: layout.count("+") + 1]
        shape = {1: (2,), 2: (2, world_size // 2), 3: (2, world_size // 4, 2)}[len(names)]
        return staged(init_device_mesh("cpu", shape, mesh_dim_names=names), model.norm.weight.dtype)
    if layout.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    strategy = ShardingStrategy.SHARD_GRAD_OP if layout == "fsdp1 grad_op" else ShardingStrategy.FULL_SHARD
    options: dict[str, Any] = {"sharding_strategy": strategy}
    if layout == "fsdp1 hybrid":
        mesh = mesh_of(world_size, "replicate", "shard")
        options = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": mesh}
    wrap = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"), **options)
    for name, layer in list(model.layers.items()):
        if name != "o_proj":  # that one shares the root's flat parameter
            model.layers[name] = wrap(layer)
    return wrap(model)


def full_parameters(layout: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole parameters by the names of the plain model, through the layout's own interface."""
    if layout.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model):
            named = {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    else:
        named = {
            n.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for n, p in model.named_parameters()
        }
    if isinstance(model, Stage):
        stages = all_ranks(named)
        named = {n: p for stage in stages for n, p in stage.items()}
        assert sum(len(stage) for stage in stages[:: len(stages) // 2]) == len(named)  # of none twice
    return named


def equality_case(
    rank: int,
    world_size: int,
    *,
    layout: str,
    dtype: torch.dtype,
    steps: int,
    options: dict[str, Any] | None = None,
    optimizer: str = "LoRAPre",
    block: int | None = None,
) -> dict[str, Any]:
    """Train under a layout; the largest distance to the reference, and what the optimizer says about itself."""
    settings = {**OPTIONS[optimizer], **(options or {})}
    model = wrapped(layout, Net(dtype), world_size)
    stepper = OPTIMIZERS[optimizer](model.named_parameters(), shard_state=layout != "ddp replicated", **settings)
    if block:
        stepper.workspace = replace(stepper.workspace, block=block)
    for step in range(steps):
        stepper.zero_grad()
        backward(model, batch_of(step, dtype))
        stepper.step()
    got, want = full_parameters(layout, model), dense_path(steps, optimizer, settings)
    assert got.keys() == want.keys(), (got.keys(), want.keys())
    errors = {n: float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want}
    worst = max(errors, key=lambda n: errors[n])
    report = stepper.memory_report()
    return {
        "error": errors[worst],
        "name": worst,
        "layout": report.layout,
        "state": report.state_bytes,
        "calls": dict(stepper.comm.calls),
    }


def habits_case(rank: int, world_size: int, *, layout: str) -> dict[str, Any]:
    """A compiled model under a layout, a gradient scaler, a schedule, hooks: the distance to the reference.

    In the fourth step one rank's gradient overflows, so that no rank steps.
    """
    model = torch.compile(wrapped(layout, Net(), world_size), backend="eager")
    optimizer = LoRAPre(model.named_parameters(), **OPTIONS["LoRAPre"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scaler = ShardedGradScaler(device="cpu", init_scale=2.0**10, growth_interval=100)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    taken = 0
    while taken < 5:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(model(batch_of(taken, torch.float32))).backward()
        if len(calls) == 6 and scaler.get_scale() == 2.0**10 and rank == world_size - 1:
            next(p for p in model.parameters() if p.grad is not None and local(p.grad).numel()).grad.mul_(torch.inf)
        before = len(calls)
        scaler.step(optimizer)
        scaler.update()
        if len(calls) > before:
            taken += 1
            schedule.step()
    got = {n.removeprefix("_orig_mod."): p for n, p in full_parameters(layout, model).items()}
    got = {n.removeprefix("module."): p for n, p in got.items()}
    want = dense_path(5, "LoRAPre", OPTIONS["LoRAPre"])
    errors = [float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want]
    return {"error": max(errors), "calls": calls, "scale": scaler.get_scale()}


def factors_case(rank: int, world_size: int, *, layout: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes of the factors that this rank keeps, and of the statistics of rows."""
    model = wrapped(layout, Net(), world_size)
    optimizer = LoRAPre(model.named_parameters(), **OPTIONS["LoRAPre"])
    return {(n, key): tuple(t.shape) for n, found in optimizer.factors().items() for key, t in found.items()}


def state_case(rank: int, world_size: int, *, model: str, lora_rank: int) -> tuple[int, int]:
    """Bytes of state on this rank under DDP with sharded and with replicated state."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for _, shape in projections(model)])
    module.forward = lambda: sum(p.sum() for p in module)
    wrapper = nn.parallel.DistributedDataParallel(module)
    named = [(name, p) for (name, _), p in zip(projections(model), module, strict=True)]
    held = []
    for shard_state in (True, False):
        optimizer = LoRAPre(named, rank=lora_rank, shard_state=shard_state)
        tensors = [t for state in optimizer.factors().values() for t in state.values()]
        held.append(sum(t.untyped_storage().nbytes() for t in tensors))
    del wrapper
    return held[0], held[1]


def policy_case(rank: int, world_size: int, *, policy: str) -> tuple[dict[str, torch.Tensor], str]:
    """Parameters after five steps under an FSDP2 policy."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    chosen: dict[str, Any] = {"mp_policy": bf16} if policy == "bf16" else {"offload_policy": CPUOffloadPolicy(False)}
    model = shard(Net(), mesh_of(world_size, "dp"), **chosen)
    optimizer = LoRAPre(model.named_parameters(), **OPTIONS["LoRAPre"])
    for step in range(5):
        optimizer.zero_grad(set_to_none=True)
        model(batch_of(step, torch.bfloat16 if policy == "bf16" else torch.float32)).backward()
        optimizer.step()
    full = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    return full, next(iter(optimizer.factors().values()))["m_B"].device.type


def refused_case(rank: int, world_size: int) -> str:
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    try:
        LoRAPre(model.named_parameters(), **OPTIONS["LoRAPre"])
    except ConfigError as error:
        return str(error)
    return "accepted"
