"""What runs on the ranks of the tests of DeepSpeed's pipeline: the model of ``cases.py`` as a ``PipelineModule``.

Its layers hand on the sum so far, and which gradient is wanted (step, data-parallel rank, micro-batch).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import groups, safe_get_full_fp32_param

import lorapre_dist
from lorapre_dist.integrations.deepspeed.names import naming
from lorapre_dist.optimizers import OPTIMIZERS

from .cases import FROZEN, SHAPES, Slope, allow_fp16, dense, ds_config, factor_at, merge, params_of, slopes, worst

Batch = tuple[torch.Tensor, torch.Tensor]
cached_slopes = functools.lru_cache(maxsize=64)(slopes)


class Adds(Slope):
    """A slope that adds to the sum that it is handed."""

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, replicas: int, frozen: bool = False) -> None:
        super().__init__(shape, seed)
        self.name, self.replicas = name, replicas
        self.weight.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, self.name)

    def add(self, x: torch.Tensor, name: str) -> torch.Tensor:
        step, rank, micro = (int(n) for n in x[1:4])
        slope = cached_slopes(step, rank, micro, self.replicas).get(name)
        if slope is None:
            slope = torch.zeros_like(self.weight, dtype=torch.float32)
        total = x[:1].float() + (self.weight.float() * slope).sum()
        return torch.cat([total, x[1:].float()])


def _head(embed: Adds, x: torch.Tensor) -> torch.Tensor:
    return embed.add(x, "head")


def _loss(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return x[0]


def pipeline(stages: int, replicas: int) -> PipelineModule:
    """``cases.Net`` in so many stages: the embedding first and, tied, last."""
    shapes = {name: shape for name, shape in {**SHAPES, **FROZEN}.items() if name != "embed"}
    seeds = {name: k for k, name in enumerate({**SHAPES, **FROZEN})}
    tied = ("embed", Adds, "embed", SHAPES["embed"], seeds["embed"], replicas)
    specs = [TiedLayerSpec(*tied)]
    specs += [LayerSpec(Adds, n, s, seeds[n], replicas, n in FROZEN) for n, s in shapes.items()]
    specs += [TiedLayerSpec(*tied, forward_fn=_head)]
    deepspeed.init_distributed(verbose=False)
    model = PipelineModule(specs, num_stages=stages, loss_fn=_loss, partition_method="uniform")
    plain = {"tied_modules.embed": "embed", **{str(k): name for k, name in enumerate(shapes, 1)}}
    lorapre_dist.deepspeed.name_layers(model, plain)
    return model


def build(stages: int, config: dict[str, Any], replicas: int) -> Any:
    allow_fp16()

    def scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)

    return lorapre_dist.initialize(model=pipeline(stages, replicas), config=config, lr_scheduler=scheduler)[0]


def close(engine: Any) -> None:
    """As ``destroy``; and DeepSpeed forgets the axes, which it would take for those of the next engine as well."""
    engine.destroy()
    groups.mpu = None
    dist.barrier()


def batches(step: int, rank: int, accumulation: int) -> Iterator[Batch]:
    for micro in range(accumulation):
        yield torch.tensor([0.0, step, rank, micro]), torch.zeros(())


def train(engine: Any, steps: range, accumulation: int) -> None:
    rank = engine.mpu.get_data_parallel_rank()
    for step in steps:
        engine.train_batch(batches(step, rank, accumulation))


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """This stage's trained parameters in fp32, by the names of the plain model."""
    named, full = naming(engine.module), engine.optimizer is engine.basic_optimizer
    trained = [(named(n), p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {n: (p.detach() if full else safe_get_full_fp32_param(p)).clone() for n, p in trained}


def everywhere(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of all stages; what several have must be the same."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    merged: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(merged.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return merged


def equality_case(
    rank: int,
    world_size: int,
    *,
    stages: int,
    stage: int,
    precision: str,
    combos: list[tuple[int, float]],
    steps: int,
    optimizer: str = "LoRAPre",
    changes: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train for ``steps`` and compare with the reference, for each (accumulation, clipping) of ``combos``."""
    found, replicas = [], world_size // stages
    for accumulation, clip in combos:
        options = {**params_of(optimizer), **(params or {})}
        config = merge(ds_config(stage, precision, accumulation, clip, options), changes or {})
        config["optimizer"]["type"] = optimizer
        engine = build(stages, config, replicas)
        try:
            train(engine, range(steps), accumulation)
            settings = OPTIMIZERS[optimizer].config_class(**options)
            want = dense(settings, steps, replicas, accumulation, clip, set(), True)
            got = everywhere(parameters(engine))
            assert got.keys() == want.keys()
            error, name = worst(got, want)
            base = engine.basic_optimizer
            found.append({"error": error, "name": name, "layout": base.layout.name})
            found[-1]["calls"] = dict(base.comm.calls)
        finally:
            close(engine)
    return found


def visit_case(
    rank: int, world_size: int, *, stages: int, stage: int, folder: str, step: int, optimizer: str = "LoRAPre"
) -> tuple[float, str]:
    """As that of ``checkpoint_cases.py``, in a pipeline; gradients are the same on every data-parallel rank."""
    config = ds_config(stage, "fp32", 1, 0.5, params_of(optimizer))
    config["optimizer"]["type"] = optimizer
    engine = build(stages, config, 1)
    try:
        if step:
            path, client = engine.load_checkpoint(folder)
            assert path is not None and client == {"step": step}, (path, client)
            assert engine.global_steps == step
        engine.train_batch(batches(step, 0, 1))
        engine.save_checkpoint(folder, client_state={"step": step + 1}, keep_last=2)
        return worst(everywhere(parameters(engine)), torch.load(Path(folder) / f"reference{step + 1}.pt"))
    finally:
        close(engine)


def state_case(rank: int, world_size: int, *, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole state of a pipeline that has trained, and that of a fresh one that loads it."""
    engine = build(2, ds_config(1, "fp32", 1, 0.0, params_of("LoRAPre")), 1)
    train(engine, range(3), 1)
    first = engine.basic_optimizer.full_state_dict()
    close(engine)
    engine = build(1, ds_config(1, "fp32", 1, 0.0, params_of("LoRAPre")), 1)
    engine.basic_optimizer.load_full_state_dict(first)
    second = engine.basic_optimizer.full_state_dict()
    close(engine)
    return first, second


def skipping_case(rank: int, world_size: int, *, stage: int) -> tuple[int, bool]:
    """A gradient of one parameter, on one stage alone, is not finite: no stage takes the step."""
    engine = build(2, ds_config(stage, "fp32", 1, 0.0, params_of("LoRAPre")), 1)
    before = {n: p.clone() for n, p in parameters(engine).items()}
    spoilt = {n: p for n, p in engine.module.named_parameters() if p.requires_grad and "tied" not in n}
    if engine.mpu.get_data_parallel_rank() == 0 and engine.is_last_stage():
        next(iter(spoilt.values())).register_hook(lambda grad: grad * float("nan"))
    train(engine, range(1), 1)
    same = all(torch.equal(p, before[n]) for n, p in parameters(engine).items())
    skipped = engine.basic_optimizer.skipped_steps
    close(engine)
    return skipped, same


def refused_case(rank: int, world_size: int) -> list[str]:
    """What bad names, and a layer that is tied in part, raise."""
    said = []
    for names in ({"12": "a"}, {"head": "a"}, {"1": "model", "2": "model"}, {"1": 3}):
        try:
            lorapre_dist.deepspeed.name_layers(pipeline(1, 1), names)
        except lorapre_dist.ConfigError as error:
            said.append(str(error))
    tied = ("both", torch.nn.Linear, 8, 8)
    model = PipelineModule([TiedLayerSpec(*tied), TiedLayerSpec(*tied)], num_stages=2, loss_fn=_loss)
    try:
        lorapre_dist.initialize(model=model, config=ds_config(1, "fp32", 1, 0.0, params_of("LoRAPre")))
    except lorapre_dist.ConfigError as error:
        said.append(str(error))
    groups.mpu = None
    return said
