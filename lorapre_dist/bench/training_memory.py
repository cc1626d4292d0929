"""The peak of live tensor bytes in a real training step of a Llama, and the planner's figure for it.

The second of two steps, after which all that stays is there: forward, backward and the optimizer's step, watched by
:class:`lorapre_dist.bench.live.Live`. On the device ``meta`` every operation is issued as on another one and takes no
memory and no time, so that large models can be counted; how a step is divided is as on a CPU there.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lorapre_dist
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.options import SIXTEEN
from lorapre_dist.core.workspace import Workspace
from lorapre_dist.optimizers import LoRAPre
from lorapre_dist.planner import MOMENTS, Request, Zero, plan
from lorapre_dist.planner.models import load
from lorapre_dist.training.engines.models import preset_config

from .live import Live

#: Rows of the table: options of the optimizer, and ``checkpointing``, which is the model's.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "checkpointing": {"checkpointing": True},
    "released": {"release_gradients": True},
    "stochastic": {"weights": "stochastic"},
    "kahan": {"weights": "kahan"},
    "bf16 state": {"state_dtype": "bf16"},
    "8-bit state": {"state_dtype": "8bit"},
    "8-bit AdamW": {"other_state": "adamw8bit"},
    "adafactor": {"other_state": "adafactor"},
    "low-rank embeddings": {"embeddings": "low_rank"},
}
ALL: dict[str, Any] = {
    **{"checkpointing": True, "release_gradients": True, "weights": "stochastic", "state_dtype": "8bit"},
    **{"embeddings": "low_rank", "other_state": "adafactor"},
}
OPTIONS["all"] = ALL
#: Of DeepSpeed's buffers, in elements: by default they are larger than these models.
BUCKET = 100_000
COLUMNS = (
    "model",
    "rank",
    "layout",
    "ranks",
    "options",
    "device",
    "peak in",
    "measured",
    "planned",
    "planned / measured",
)


class AsOnCpu(Workspace):
    """A workspace that takes every device for a CPU."""

    def block_on(self, kind: str) -> int:
        """As on a CPU."""
        return super().block_on("cpu")

    def bucket_on(self, kind: str) -> int:
        """As on a CPU."""
        return super().bucket_on("cpu")

    def fewest_on(self, kind: str) -> int:
        """As on a CPU."""
        return super().fewest_on("cpu")


@dataclass(frozen=True)
class Case:
    """A training run: model, the factors' rank, where it lies, with which options, on how many tokens."""

    model: str
    rank: int
    layout: str = "ddp"
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int = 128
    device: str = "cpu"

    @property
    def ours(self) -> dict[str, Any]:
        """Options of the optimizer; DeepSpeed's engine releases no gradients."""
        left_out = ["checkpointing", *(["release_gradients"] if self.layout.startswith("zero") else [])]
        return {"lr": 1e-3, "rank": self.rank, **{k: v for k, v in self.options.items() if k not in left_out}}

    @property
    def sixteen(self) -> bool:
        """Whether the weights are bf16; all is fp32 otherwise."""
        return self.options.get("weights") in SIXTEEN

    def request(self, world_size: int) -> Request:
        """What the planner is asked."""
        return Request(
            self.model,
            load(self.model),
            self.layout,
            world_size,
            "bf16" if self.sixteen else "fp32",
            optimizer=LoRAPreConfig(**self.ours),
            zero=Zero(reduce_bucket_size=BUCKET),
            cpu=True,
            seq_len=self.tokens,
            checkpointing=self.options.get("checkpointing", False),
        )


def measured(case: Case, world_size: int = 1) -> dict[str, int]:
    """Bytes alive at the peak of each moment of a step on this rank."""
    live = Live(case.device)
    with live:
        train = _training(case, world_size, live)
        train()
        live.peaks.clear()
        train()
    return live.peaks


def planned(case: Case, world_size: int = 1, rank: int = 0) -> dict[str, int]:
    """The same by the planner."""
    usage = plan(case.request(world_size), ("LoRAPre",))["LoRAPre"]
    at = rank if len(usage.total) > 1 else 0
    return {moment: sum(int(part[at]) for part in usage.moments[moment].values()) for moment in MOMENTS}


def row(case: Case, name: str, found: dict[str, int], world_size: int = 1, rank: int = 0) -> dict[str, str]:
    """A line of the table."""
    peak, said = max(found[moment] for moment in MOMENTS), max(planned(case, world_size, rank).values())
    when = max(MOMENTS, key=lambda moment: found[moment])
    sizes = (f"{peak / 2**20:.1f} MiB", f"{said / 2**20:.1f} MiB", f"{said / peak:.3f}")
    layout = "one device" if world_size == 1 else case.layout
    cells = (case.model, str(case.rank), layout, str(world_size), name, case.device, when, *sizes)
    return dict(zip(COLUMNS, cells, strict=True))


def write(rows: Iterable[dict[str, str]], path: Path) -> None:
    """The table as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _training(case: Case, world_size: int, live: Live) -> Callable[[], None]:
    """Takes one step; the model's weights count as there already."""
    from transformers import LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = preset_config(case.model, case.tokens)
    if case.device == "meta":
        ALL_ATTENTION_FUNCTIONS.register("counted_on_meta", _flash)
        config._attn_implementation = "counted_on_meta"
    torch.manual_seed(0)
    with torch.device(case.device):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16 if case.sixteen else torch.float32)
    if case.options.get("checkpointing"):
        reentrant = case.layout == "zero3"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    for p in model.parameters():
        live.see(p.data)
    ids = torch.zeros(1, case.tokens, dtype=torch.long, device=case.device)
    if case.layout.startswith("zero"):
        return _under_deepspeed(case, model, ids, live)
    if case.layout == "fsdp2":
        _shard(model, world_size, case.sixteen)
    optimizer = LoRAPre(model, **case.ours)
    if case.device == "meta":
        optimizer.workspace = AsOnCpu()
    optimizer.memory_report()

    def train() -> None:
        with live.moment("forward"):
            loss = model(input_ids=ids, labels=ids).loss
        with live.moment("backward"):
            loss.backward()
            del loss
        with live.moment("step"):
            optimizer.step()
            optimizer.zero_grad()

    return train


def _flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    """What scaled_dot_product_attention calls on a CPU; on ``meta`` it would choose the form that keeps scores."""
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scaling)
    return found[0].transpose(1, 2), None


def _shard(model: Any, world_size: int, sixteen: bool) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if sixteen else None, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _under_deepspeed(case: Case, model: Any, ids: Tensor, live: Live) -> Callable[[], None]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "LoRAPre", "params": case.ours},
        "zero_optimization": {"stage": int(case.layout[-1]), "reduce_bucket_size": BUCKET, "overlap_comm": False},
    }
    if case.sixteen:
        on = ("enabled", "bf16_master_weights_and_grads", "bf16_optimizer_states")
        config["bf16"] = dict.fromkeys(on, True)
    engine = lorapre_dist.initialize(model=model, config=config)[0]

    def train() -> None:
        with live.moment("forward"):
            loss = engine(input_ids=ids, labels=ids).loss
        with live.moment("backward"):
            engine.backward(loss)
            del loss
        with live.moment("step"):
            engine.step()

    return train


def on_rank(rank: int, world_size: int, case: dict[str, Any]) -> dict[str, int]:
    """:func:`measured` on one of several ranks."""
    return measured(Case(**case), world_size)
