"""What runs on the ranks of the planner's tests: a small Llama under every layout, one step, and what that took."""

from __future__ import annotations

import gc
import time
from collections import Counter
from typing import Any

import deepspeed
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel

import lorapre_dist
from lorapre_dist.integrations.deepspeed.bind import base_optimizer
from tests.deepspeed.cases import allow_fp16

# Sizes that no world size divides, a key and a value that are narrower, a tied head.
CONFIG: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 154,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 251,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
# Experts are stacks of matrices there, whose rows must be of 16 bytes or a multiple.
EXPERTS: dict[str, Any] = {
    **CONFIG,
    "intermediate_size": 156,
    "num_local_experts": 5,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
BUCKET = 20_000
# How often memory is looked at before a step: gloo's threads let go of what they have sent a moment later.
LOOKS = 5
PARAMS: dict[str, Any] = {"lr": 1e-3, "rank": 8, "rank_v": 3}


# What PyTorch calls the collectives that frameworks use, and how often each byte is sent in a ring, times n / (n - 1).
COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce gradients", 2),
    "c10d::reduce_": ("reduce-scatter gradients", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter gradients", 1),
    "c10d::_allgather_base_": ("all-gather weights", 1),
}


class Counting(TorchDispatchMode):
    """While entered, counts the bytes of collectives by purpose, unless ``paused``."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.world_size, self.paused = world_size, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        purpose, times = COLLECTIVES.get(func._schema.name, ("", 0))
        if times and not self.paused:
            # Tensors or lists of them; of two, the larger is the whole and the other one a part of it.
            sizes = [sum(t.nbytes for t in (x if isinstance(x, list) else [x])) for x in args[:2] if _is_data(x)]
            self.sent[purpose] += round(max(sizes) * times * (self.world_size - 1) / self.world_size)
        return func(*args, **(kwargs or {}))


def _is_data(x: Any) -> bool:
    return isinstance(x, torch.Tensor) or (isinstance(x, list) and all(isinstance(t, torch.Tensor) for t in x))


def config_of(model: str) -> PretrainedConfig:
    return MixtralConfig(**EXPERTS) if model == "mixtral" else LlamaConfig(**CONFIG)


def build(model: str) -> PreTrainedModel:
    """The model with small random weights; transformers leaves those of experts as the memory was."""
    module = AutoModelForCausalLM.from_config(config_of(model), experts_implementation="eager")
    for p in module.parameters():
        getattr(p, "ds_tensor", p).data.normal_(std=0.02)
    return module


def ds_config(layout: str, precision: str, zero: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LoRAPre", "params": {**PARAMS, **params}},
        "zero_optimization": {"stage": int(layout[-1]), "reduce_bucket_size": BUCKET, **zero},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config


def measured_case(
    rank: int,
    world_size: int,
    *,
    layout: str,
    precision: str,
    zero: dict[str, Any],
    params: dict[str, Any],
    model: str = "llama",
) -> dict[str, Any]:
    """Train two steps; state, workspace and sent bytes as the optimizer tells them after the first, what lay in memory,
    and what the framework sent in the second.
    """
    allow_fp16()
    gc.collect()
    gc.freeze()  # what is there already is not counted, nor looked at again
    torch.manual_seed(0)
    ids = torch.randint(CONFIG["vocab_size"], (1, 6))
    if layout.startswith("zero"):
        config = ds_config(layout, precision, zero, params)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=layout == "zero3"):
            module = build(model)
        engine = lorapre_dist.initialize(model=module, config=config)[0]
        optimizer, backward, step, close = base_optimizer(engine), engine.backward, engine.step, engine.destroy
    else:
        engine = _native(layout, build(model), world_size)
        optimizer = lorapre_dist.LoRAPre(engine.named_parameters(), **{**PARAMS, **params})
        backward, step, close = torch.Tensor.backward, optimizer.step, lambda: None
    alive, counting = [], Counting(world_size)
    inner = optimizer.step

    def look(buffers: set[int]) -> int:
        time.sleep(0.02)
        gc.collect()
        return sum(size for address, size in _tensors().items() if address not in buffers)

    def watched(*args: Any, **kwargs: Any) -> Any:
        optimizer.memory_report()  # binds the layout
        buffers = {t.untyped_storage().data_ptr() for t in optimizer.workspace.buffers.values()}
        alive.append(min(look(buffers) for _ in range(LOOKS)))
        counting.paused = True
        try:
            return inner(*args, **kwargs)
        finally:
            counting.paused = False

    def train() -> None:
        loss = engine(input_ids=ids, labels=ids).loss
        backward(loss)
        del loss
        step() if layout.startswith("zero") else watched()

    optimizer.step = watched
    train()
    sent = dict(optimizer.comm.bytes)
    with counting:  # ZeRO-3 takes its first step to learn the order of the model's modules
        train()
    report = optimizer.memory_report()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for bound in optimizer.bound()
        for t in bound.state.tensors().values()
        if t.numel()
    }
    found = {
        "state": report.state_bytes,
        "held": sum(held.values()),
        "workspace": report.workspace_bytes,
        "sent": sent,
        "frame_sent": dict(counting.sent),
        "alive": max(alive),  # ZeRO-3 steps sub-group by sub-group
    }
    close()
    gc.unfreeze()
    return found


def _native(layout: str, model: Any, world_size: int) -> Any:
    if layout == "ddp":
        return DistributedDataParallel(model) if world_size > 1 else model
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    return fully_shard(model, mesh=mesh)


def _tensors() -> dict[int, int]:
    """Bytes by address of the memory of every tensor that Python can see, gradients included."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                storage = None if tensor is None else getattr(tensor, "_local_tensor", tensor).untyped_storage()
                if storage is not None and storage.nbytes():
                    found[storage.data_ptr()] = storage.nbytes()
    return found
