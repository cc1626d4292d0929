"""What runs on the ranks of the tests of axes: a Llama in stages, split or both, trained; what each axis sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lorapre_dist
from lorapre_dist.integrations.deepspeed.bind import base_optimizer
from lorapre_dist.layouts.geometry.axes import stages as dealt_out
from lorapre_dist.training.engines import pipeline
from lorapre_dist.training.engines.pipeline import Block, NextToken

from .cases import BUCKET
from .counting import _described

# Two ranks divide what they split; the number of layers is odd, so that stages are unlike.
CONFIG: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 154,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 250,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "use_cache": False,
}
PARAMS: dict[str, Any] = {"lr": 1e-3, "rank": 8, "rank_v": 3}
MICRO_BATCHES, LENGTH = 3, 6

#: What PyTorch calls a collective, and how often each byte goes round the ring.
KINDS = {
    **dict.fromkeys(("c10d::allreduce_", "_c10d_functional::all_reduce"), ("all-reduce", 2)),
    **dict.fromkeys(("c10d::_allgather_base_", "_c10d_functional::all_gather_into_tensor"), ("all-gather", 1)),
    **dict.fromkeys(("c10d::_reduce_scatter_base_", "c10d::reduce_"), ("reduce-scatter", 1)),
    "c10d::send": ("send", 0),
}


class ByAxis(TorchDispatchMode):
    """While entered and not ``paused``, counts what is sent by axis and collective; a rank's place is (stage, d, t)."""

    def __init__(self, stages: int, parts: int) -> None:
        super().__init__()
        world = dist.get_world_size()
        self.sent: Counter[tuple[str, str]] = Counter()
        self.paused, self.parts, self.inside = False, parts, world // stages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in KINDS and not self.paused:
            self._count(*KINDS[func._schema.name], args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, times: int, args: Any, kwargs: Any) -> None:
        group = next(found for x in (*args, *kwargs.values()) if (found := _group(x)) is not None)
        ranks, largest = dist.get_process_group_ranks(group), max(map(_bytes, args[:2]))
        if len(ranks) > 1:
            self.sent[self.axis(ranks), kind] += round(largest * times * (1 - 1 / len(ranks))) if times else largest

    def axis(self, ranks: list[int]) -> str:
        if ranks[-1] - ranks[0] >= self.inside:
            return "pipeline"
        return "tensor" if len(ranks) <= self.parts and ranks[1] - ranks[0] == 1 and self.parts > 1 else "data"


def _bytes(x: Any) -> int:
    if isinstance(x, torch.Tensor):
        return int(x.nbytes)
    return sum(map(_bytes, x)) if isinstance(x, (list, tuple)) else 0


def _group(x: Any) -> Any:
    if isinstance(x, str):
        try:
            return _resolve_process_group(x)
        except Exception:
            return None
    if isinstance(x, dist.ProcessGroup):
        return x
    try:
        return dist.ProcessGroup.unbox(x)
    except Exception:
        return None


@contextmanager
def watched(optimizer: Any, counting: ByAxis) -> Iterator[None]:
    """Steps of the optimizer are not counted."""
    inner = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        counting.paused = True
        try:
            return inner(*args, **kwargs)
        finally:
            counting.paused = False

    optimizer.step = step
    try:
        yield
    finally:
        optimizer.step = inner


def axes_case(rank: int, world_size: int, *, layout: str, stages: int, parts: int) -> dict[str, Any]:
    """Train two steps, in stages or split; what the second one sent: ours by purpose, the rest by axis and kind."""
    torch.manual_seed(0)
    build = _engine if layout.startswith("zero") else _native
    optimizer, train, close = build(layout, stages, parts, world_size)
    counting = ByAxis(stages, parts)
    try:
        train()
        optimizer.comm.reset()
        with watched(optimizer, counting), counting:
            train()
        return {
            "pieces": [_described(p, unit) for unit in optimizer.layout.units for p in unit.pieces],
            "state": optimizer.memory_report().state_bytes,
            "sent": {purpose: n for purpose, n in optimizer.comm.bytes.items() if n},
            "frame_sent": dict(counting.sent),
        }
    finally:
        close()


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


Built = tuple[Any, Callable[[], None], Callable[[], None]]


def _engine(layout: str, stages: int, parts: int, world_size: int) -> Built:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LoRAPre", "params": PARAMS},
        "zero_optimization": {"stage": int(layout[-1]), "reduce_bucket_size": BUCKET},
    }
    deepspeed.init_distributed(verbose=False)
    module = llama()
    if stages > 1:
        module = pipeline.pipeline(module, stages, parts)
    elif parts > 1:
        config["tensor_parallel"] = {"autotp_size": parts}
    engine = lorapre_dist.initialize(model=module, config=config)[0]
    tokens = torch.randint(CONFIG["vocab_size"], (1, LENGTH))

    def train() -> None:
        if stages > 1:
            pipeline.train_step(engine, [tokens] * MICRO_BATCHES)
            return
        for _ in range(MICRO_BATCHES):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    def close() -> None:
        engine.destroy()
        groups.mpu = None
        dist.barrier()

    return base_optimizer(engine), train, close


class Stage(torch.nn.Module):
    """The layers of a Llama that have some of its parameters."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        kept = {name.rpartition(".")[0] for name in names}
        self.model, inner = torch.nn.Module(), model.model
        if "model.embed_tokens" in kept:
            self.model.embed_tokens = inner.embed_tokens
        mine = {k: layer for k, layer in enumerate(inner.layers) if f"model.layers.{k}.mlp.up_proj" in kept}
        self.model.layers = torch.nn.ModuleDict({str(k): layer for k, layer in mine.items()})
        if "lm_head" in kept:
            self.model.norm, self.lm_head = inner.norm, model.lm_head
        self.rotary = inner.rotary_emb

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self.model, "embed_tokens"):
            x = self.model.embed_tokens(x)
        for layer in self.model.layers.values():
            x = Block.forward(_Placed(layer, self.rotary), x)
        return self.lm_head(self.model.norm(x)) if hasattr(self, "lm_head") else x


class _Placed:
    """A block's parts, as ``Block`` has them."""

    def __init__(self, layer: Any, rotary: Any) -> None:
        self.layer, self.rotary = layer, rotary


def _native(layout: str, stages: int, parts: int, world_size: int) -> Built:
    model = llama()
    sizes = {"pp": stages, "dp": world_size // (stages * parts), "tp": parts}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "dp"}
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    tokens = torch.randint(CONFIG["vocab_size"], (MICRO_BATCHES, LENGTH))
    module: Any = model
    if stages > 1:
        named = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        index = mesh.get_local_rank("pp")
        module = Stage(model, dealt_out(named, stages)[index])
    blocks = module.model.layers
    blocks = list(blocks.values() if stages > 1 else blocks)
    if parts > 1:
        split(blocks, mesh["tp"])
    for block in blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    optimizer = lorapre_dist.LoRAPre(module.named_parameters(), **PARAMS)
    loss = NextToken()
    if stages > 1:
        stage = PipelineStage(module, index, stages, torch.device("cpu"), group=mesh.get_group("pp"))
        schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss)

    def train() -> None:
        optimizer.zero_grad()
        if stages > 1:
            given = () if index else (tokens,)
            schedule.step(*given, target=tokens) if index == stages - 1 else schedule.step(*given)
        else:
            for one in tokens.split(1):
                (module(input_ids=one, labels=one).loss / MICRO_BATCHES).backward()
        optimizer.step()

    return optimizer, train, dist.barrier


def split(blocks: list[Any], mesh: DeviceMesh) -> None:
    plan = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    plan |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
    for block in blocks:
        parallelize_module(block, mesh, plan)
