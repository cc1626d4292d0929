"""What runs on the ranks of the DeepSpeed tests.

The model's loss is linear, ``sum(weight * G)``, so every gradient is known exactly, whatever the weights: the ``G`` are
small multiples of powers of two (times the world size), chosen so that scaling, averaging over ranks and accumulating
are exact in fp32, bf16 and fp16 alike. What is left to differ from the dense reference is the optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param

import lorapre_dist
from lorapre_dist.config import LowRankConfig
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle

SHAPES = {
    "layers.0.q_proj": (24, 36),
    "layers.0.norm": (23,),
    "layers.0.o_proj": (19, 29),
    "layers.1.up_proj": (37, 22),
    "layers.1.bias": (5,),
    "layers.1.experts.up_proj": (3, 14, 11),
    "layers.1.sometimes.down_proj": (22, 25),
    "embed": (13, 11),
}
FROZEN = {"layers.1.frozen.q_proj": (9, 16)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Slope(torch.nn.Module):
    """``sum(weight * G)``."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randint(-8, 9, shape, generator=generator) / 32)

    def forward(self, slope: torch.Tensor) -> torch.Tensor:
        return (self.weight.float() * slope).sum()


class Net(torch.nn.Module):
    """Slopes under the names of a small Llama, with a tied head and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        for k, (name, shape) in enumerate({**SHAPES, **FROZEN}.items()):
            parent: torch.nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(leaf, Slope(shape, k))
        for name in FROZEN:
            self.get_submodule(name).weight.requires_grad_(False)
        self.head = Slope(SHAPES["embed"], 99)
        self.head.weight = self.embed.weight

    def forward(self, slopes: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.get_submodule(name)(slope) for name, slope in slopes.items()]).sum()


def slopes(step: int, rank: int, micro: int, world_size: int) -> dict[str, torch.Tensor]:
    """The gradients of one micro-batch on one rank, per module; the tied head adds to ``embed``."""
    found = {}
    for k, (name, shape) in enumerate([*SHAPES.items(), ("head", SHAPES["embed"])]):
        if "sometimes" in name and step % 3 == 1:
            continue
        generator = torch.Generator().manual_seed(7919 * k + 101 * step + 13 * rank + micro)
        noise = torch.randn(shape, generator=generator)
        trend = torch.randn(shape, generator=torch.Generator().manual_seed(k))
        limit = 2 if name in ("embed", "head") else 4
        found[name] = (1.5 * trend + 1.5 * noise).round().clamp(-limit, limit) * world_size / 16
    return found


def mean_gradients(step: int, world_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    """What the optimizer should see at ``step``, by parameter name, in fp64."""
    total = {f"{name}.weight": torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for rank in range(world_size):
        for micro in range(accumulation):
            for name, slope in slopes(step, rank, micro, world_size).items():
                total[f"{'embed' if name == 'head' else name}.weight"] += slope.double()
    return {name: g / (world_size * accumulation) for name, g in total.items()}


_references: dict[str, dict[str, torch.Tensor]] = {}


def dense(
    config: LowRankConfig, steps: int, world_size: int, accumulation: int, clip: float, skip: set[int], schedule: bool
) -> dict[str, torch.Tensor]:
    """The reference's parameters after ``steps``, by name; a rank that has computed them keeps them."""
    arguments = (config, steps, world_size, accumulation, clip, skip, schedule)
    if repr(arguments) not in _references:
        *_, _references[repr(arguments)] = dense_path(*arguments)
    return _references[repr(arguments)]


def dense_path(
    config: LowRankConfig, steps: int, world_size: int, accumulation: int, clip: float, skip: set[int], schedule: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """The reference's parameters at the start and after each step; the same tensors every time."""
    model = Net()
    theta = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    matrices = oracle.each_expert(theta)
    state = oracle.init(matrices, config, lambda n, p: p.ndim == 2 and "proj" in n and 0 < config.rank < min(p.shape))
    taken = 0
    yield theta
    for step in range(steps):
        if step in skip:
            continue
        grads = mean_gradients(step, world_size, accumulation)
        if clip:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            factor = min(1.0, float(clip / (norm + 1e-6)))
            grads = {n: g * factor for n, g in grads.items()}
        now = replace(config, lr=config.lr * (factor_at(taken) if schedule else 1.0))
        oracle.step(matrices, oracle.each_expert(grads), state, now, config.lr)
        taken += 1
        yield theta


def factor_at(step: int) -> float:
    return (step + 1) / 10 if step < 10 else max(0.1, 1 - 0.03 * (step - 10))


def ds_config(stage: int, precision: str, accumulation: int, clip: float, params: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LoRAPre", "params": params},
        "zero_optimization": {"stage": stage},
    }
    if stage == 3:
        config["zero_optimization"].update(sub_group_size=400, stage3_param_persistence_threshold=10)
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 6}
    return config


def merge(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(config)
    for key, value in changes.items():
        merged[key] = merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def allow_fp16() -> None:
    """DeepSpeed's CPU accelerator reports no fp16; its optimizers run there all the same."""
    cls = type(get_accelerator())
    cls.is_fp16_supported = lambda self: True
    cls.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]


def build(config: dict[str, Any], door: str = "lorapre", zero_init: bool | None = None, **kwargs: Any) -> Any:
    """The engine, through either door; under ZeRO-3 the model is built in ``zero.Init`` unless told otherwise."""
    allow_fp16()
    if zero_init or (zero_init is None and config["zero_optimization"]["stage"] == 3):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Net()
    else:
        model = Net()
    enter = lorapre_dist.initialize if door == "lorapre" else deepspeed.initialize
    return enter(model=model, config=config, **kwargs)[0]


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The fp32 parameters of an engine by name, through DeepSpeed's own interface where it has one."""
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_optimization_stage() < 3 and all(p.dtype == torch.float32 for p in named.values()):
        return {n: p.detach().clone() for n, p in named.items()}
    if engine.zero_optimization_stage() > 0:
        return {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups"):
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        masters = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {n: masters[id(p)].detach().clone() for n, p in named.items()}
    raise AssertionError(f"no fp32 parameters to be found in {type(wrapper).__name__}")


def train(engine: Any, rank: int, world_size: int, steps: range, accumulation: int, overflow_at: int = -1) -> None:
    for step in steps:
        for micro in range(accumulation):
            batch = slopes(step, rank, micro, world_size)
            if step == overflow_at and rank == world_size - 1:
                batch = {name: slope * 1e6 for name, slope in batch.items()}
            engine.backward(engine(batch))
            engine.step()


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    errors = {n: float((got[n].double() - want[n]).norm() / want[n].norm()) for n in want}
    name = max(errors, key=lambda n: errors[n])
    return errors[name], name


PARAMS = {"lr": 0.01, "rank": 4, "weight_decay": 0.05, "betas": [0.9, 0.99]}
_ADAMW = {"adamw_lr": 0.01, "adamw_betas": [0.9, 0.99], "adamw_weight_decay": 0.05}
OTHER_PARAMS: dict[str, dict[str, Any]] = {
    "LoRAPreMuon": {"lr": 0.01, "rank": 4, **_ADAMW},
    "LoRAPreSGD": {"lr": 0.01, "rank": 4, "weight_decay": 0.05, **_ADAMW},
    "LoRAPreLion": {"lr": 0.001, "rank": 4, "weight_decay": 0.05, **_ADAMW},
    "LoRAPreAdafactor": PARAMS,
}


def params_of(optimizer: str) -> dict[str, Any]:
    return PARAMS if optimizer == "LoRAPre" else OTHER_PARAMS[optimizer]


def equality_case(
    rank: int,
    world_size: int,
    *,
    stage: int,
    precision: str,
    combos: list[tuple[int, float]],
    steps: int,
    changes: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    overflow_at: int = -1,
    door: str = "lorapre",
    schedule: bool = True,
    zero_init: bool | None = None,
    optimizer: str = "LoRAPre",
) -> list[dict[str, Any]]:
    """Train for ``steps`` and compare with the reference, for each (accumulation, clipping) of ``combos``."""
    found = []
    for accumulation, clip in combos:
        options = {**params_of(optimizer), **(params or {})}
        config = merge(ds_config(stage, precision, accumulation, clip, options), changes or {})
        config["optimizer"]["type"] = optimizer
        kwargs: dict[str, Any] = {}
        if schedule:
            kwargs["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)
        engine = build(config, door, zero_init, **kwargs)
        try:
            train(engine, rank, world_size, range(steps), accumulation, overflow_at)
            skip = {overflow_at} if overflow_at >= 0 else set()
            settings = OPTIMIZERS[optimizer].config_class(**options)
            want = dense(settings, steps, world_size, accumulation, clip, skip, schedule)
            error, name = worst(full_parameters(engine), want)
            base = lorapre_dist.deepspeed.base_optimizer(engine)
            found.append(
                {
                    "accumulation": accumulation,
                    "clip": clip,
                    "error": error,
                    "name": name,
                    "layout": base.layout.name,
                    "steps": {b.state.step for b in base.bound()},
                    "factors": sorted(base.factors()),
                    "calls": dict(base.comm.calls),
                    "skipped": engine.skipped_steps,
                }
            )
        finally:
            engine.destroy()
            dist.barrier()
    return found
