"""What runs on the ranks of the tests of tensor parallelism under DeepSpeed: Megatron's conventions, and AutoTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import GatherReplacedLayerParams
from deepspeed.utils import groups, safe_get_full_fp32_param
from transformers import LlamaConfig, LlamaForCausalLM

import lorapre_dist
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle

from . import cases
from .cases import dense, ds_config, params_of, slopes, worst
from .checkpoint_cases import scheduler

#: Along which dimension a parameter of ``cases.Net`` is split; parts differ in size.
DIMS = {
    "layers.0.q_proj": 0,
    "layers.0.o_proj": 1,
    "layers.1.up_proj": 0,
    "layers.1.bias": 0,
    "layers.1.sometimes.down_proj": 1,
    "embed": 1,
}


class Units:
    """Megatron's ``mpu``: ``size`` neighbours share matrices."""

    def __init__(self, size: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.tensor = group
        for first in range(size):
            ranks = list(range(first, world, size))
            group = dist.new_group(ranks)
            if rank in ranks:
                self.data = group

    def get_model_parallel_group(self) -> Any:
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.tensor)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.tensor)

    def get_data_parallel_group(self) -> Any:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)


def model(units: Units) -> torch.nn.Module:
    """``cases.Net`` of which each matrix of :data:`DIMS` is a part."""
    made = cases.Net()
    size, index = units.get_model_parallel_world_size(), units.get_model_parallel_rank()
    for name, dim in DIMS.items():
        module = made.get_submodule(name)
        part = torch.nn.Parameter(module.weight.data.tensor_split(size, dim)[index].clone())
        part.tensor_model_parallel, part.partition_dim, part.partition_stride = True, dim, 1
        module.weight = part
    made.head.weight = made.embed.weight
    return made


def part_of(name: str, tensor: torch.Tensor, units: Units) -> torch.Tensor:
    dim = DIMS.get("embed" if name == "head" else name)
    if dim is None:
        return tensor
    return tensor.tensor_split(units.get_model_parallel_world_size(), dim)[units.get_model_parallel_rank()]


def parameters(engine: Any, units: Units) -> dict[str, torch.Tensor]:
    """Whole parameters; what several ranks have must be the same."""
    full = engine.optimizer is engine.basic_optimizer
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    mine = {n: (p.detach() if full else safe_get_full_fp32_param(p)).clone() for n, p in named.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (units.get_model_parallel_rank(), mine))
    by_rank: dict[int, dict[str, torch.Tensor]] = {}
    for index, found in everyone:
        for name, tensor in by_rank.setdefault(index, found).items():
            assert torch.equal(tensor, found[name]), f"{name} differs between data-parallel ranks"
    whole = {}
    for name, tensor in mine.items():
        dim = DIMS.get(name.removesuffix(".weight"))
        parts = [by_rank[k][name] for k in sorted(by_rank)]
        assert dim is not None or all(torch.equal(part, tensor) for part in parts), f"{name} differs between ranks"
        whole[name] = tensor if dim is None else torch.cat(parts, dim)
    return whole


def build(units: Units, stage: int, precision: str, clip: float, optimizer: str) -> Any:
    config = ds_config(stage, precision, 1, clip, params_of(optimizer))
    config["optimizer"]["type"] = optimizer
    if precision == "bf16" and stage == 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return lorapre_dist.initialize(model=model(units), config=config, mpu=units, lr_scheduler=scheduler)[0]


def close(engine: Any) -> None:
    engine.destroy()
    groups.mpu = None
    dist.barrier()


def equality_case(
    rank: int,
    world_size: int,
    *,
    size: int,
    stage: int,
    precision: str = "fp32",
    clip: float,
    steps: int,
    optimizer: str = "LoRAPre",
) -> dict[str, Any]:
    """Train for ``steps``, ``size`` ranks to a matrix, and compare with the reference."""
    deepspeed.init_distributed(verbose=False)
    units = Units(size)
    replicas, replica = world_size // size, units.get_data_parallel_rank()
    engine = build(units, stage, precision, clip, optimizer)
    try:
        for step in range(steps):
            batch = slopes(step, replica, 0, replicas)
            engine.backward(engine({name: part_of(name, slope, units) for name, slope in batch.items()}))
            engine.step()
        settings = OPTIMIZERS[optimizer].config_class(**params_of(optimizer))
        error, name = worst(parameters(engine, units), dense(settings, steps, replicas, 1, clip, set(), True))
        base = engine.basic_optimizer
        return {"error": error, "name": name, "layout": base.layout.name, "factors": sorted(base.factors())}
    finally:
        close(engine)


def visit_case(rank: int, world_size: int, *, size: int, stage: int, folder: str, step: int) -> tuple[float, str]:
    """As that of ``checkpoint_cases.py``; gradients are the same on every data-parallel rank."""
    deepspeed.init_distributed(verbose=False)
    units = Units(size)
    engine = build(units, stage, "fp32", 0.5, "LoRAPre")
    try:
        if step:
            path, client = engine.load_checkpoint(folder)
            assert path is not None and client == {"step": step}, (path, client)
        batch = slopes(step, 0, 0, 1)
        engine.backward(engine({name: part_of(name, slope, units) for name, slope in batch.items()}))
        engine.step()
        engine.save_checkpoint(folder, client_state={"step": step + 1}, keep_last=2)
        return worst(parameters(engine, units), torch.load(Path(folder) / f"reference{step + 1}.pt"))
    finally:
        close(engine)


def autotp_case(rank: int, world_size: int, *, stage: int, steps: int, optimizer: str = "LoRAPre") -> dict[str, Any]:
    """A real Llama that DeepSpeed's AutoTP splits over two ranks, against autograd and the reference on one process."""
    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=62,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        use_cache=False,
    )
    replicas = world_size // 2
    batches = [torch.randint(61, (replicas, 2, 16), generator=torch.Generator().manual_seed(s)) for s in range(steps)]

    def llama() -> torch.nn.Module:
        torch.manual_seed(5)
        return LlamaForCausalLM(shape)

    small = {"lr": 1e-4 if optimizer == "LoRAPreLion" else 1e-3}
    options = {**params_of(optimizer), **small, "target_modules": ["self_attn", "mlp"]}
    config = {**ds_config(stage, "fp32", 1, 1.0, options), "tensor_parallel": {"autotp_size": 2}}
    config["optimizer"]["type"] = optimizer
    engine = lorapre_dist.initialize(model=llama(), config=config)[0]
    try:
        replica = groups.get_data_parallel_rank()
        for batch in batches:
            engine.backward(engine(input_ids=batch[replica], labels=batch[replica]).loss)
            engine.step()
        got, split = {}, 0
        for name, p in engine.module.named_parameters():
            with GatherReplacedLayerParams([p], engine.module, enabled=True):
                split += hasattr(p, "ds_autotp_universal_checkpoint_meta")
                got[name] = p.detach().clone()
        layout = engine.basic_optimizer.layout.name
    finally:
        engine.destroy()
        groups.mpu = None
        dist.barrier()
    settings, single = OPTIMIZERS[optimizer].config_class(**options), llama().double()
    named = dict(single.named_parameters())
    theta = {n: p.data for n, p in named.items()}
    state = oracle.init(theta, settings, lambda n, _: "proj" in n)
    for batch in batches:
        single.zero_grad()
        sum(single(input_ids=part, labels=part).loss / replicas for part in batch).backward()
        torch.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        oracle.step(theta, {n: p.grad for n, p in named.items()}, state, settings)
    error, name = worst(got, theta)
    return {"error": error, "name": name, "split": split, "layout": layout}
