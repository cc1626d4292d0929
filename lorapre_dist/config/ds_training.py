"""The DeepSpeed JSON as the one source of batch sizes, optimizer and precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from lorapre_dist.config import CONFIGS, ConfigError, ds_json
from lorapre_dist.config.ds_json import BATCH_SIZES, precision, zero_stage
from lorapre_dist.config.instead import RELEASE_UNDER_DEEPSPEED
from lorapre_dist.config.options import SIXTEEN

#: What the backends without DeepSpeed read, or can do without telling.
NATIVE = {*BATCH_SIZES, *ds_json.PRECISIONS, "gradient_clipping", "optimizer", "steps_per_print"}

__all__ = ["precision", "zero_stage"]


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step, per forward pass and rank, and forward passes per step and rank."""

    global_batch: int
    micro_batch: int
    accumulation: int


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The configuration in the file ``path``, or in base64, that a training program can work with.

    Raises:
        ConfigError: it cannot be read, a value ``"auto"`` or of another type, no optimizer, or a scheduler (the
            program has its own).
    """
    with ds_json.naming(f"--deepspeed_config {path}"):
        config = ds_json.read(path)
        ds_json.check_values(config)
        if config.get("optimizer") is None:
            raise ConfigError('needs "optimizer": {"type": "LoRAPre", "params": {...}}')
        if "scheduler" in config:
            raise ConfigError(
                "remove 'scheduler': the program warms up over --warmup_steps and decays to a tenth of "
                "optimizer.params.lr by itself"
            )
    return config


def override_lr(config: dict[str, Any], lr: float) -> dict[str, Any]:
    """A copy of ``config`` with ``optimizer.params.lr`` set to ``lr``."""
    return override(config, lr=lr)


def override(config: dict[str, Any], **params: Any) -> dict[str, Any]:
    """A copy of ``config`` with some of ``optimizer.params`` set."""
    config = copy.deepcopy(config)
    config["optimizer"]["params"] = {**(config["optimizer"].get("params") or {}), **params}
    return config


def releases_gradients(config: dict[str, Any]) -> bool:
    """Whether the optimizer steps in the backward pass."""
    return (config["optimizer"].get("params") or {}).get("release_gradients") is True


def check_release(backend: str, config: dict[str, Any], batch: BatchSizes) -> None:
    """Raise a ConfigError where gradients shall be released, and something needs all of them."""
    if not releases_gradients(config):
        return
    if backend == "deepspeed":
        raise ConfigError(RELEASE_UNDER_DEEPSPEED + " (--backend fsdp2)")
    if limit := clipping(config):
        whose = "" if "gradient_clipping" in config else ", DeepSpeed's default"
        raise ConfigError(
            f"release_gradients: no gradient is left to clip by the global norm (gradient_clipping={limit:g}{whose}): "
            "set gradient_clipping to 0; max_update bounds each element of an update, and clip_each clips each "
            "parameter's gradient by its own norm"
        )
    if batch.accumulation > 1:
        raise ConfigError(
            f"release_gradients: gradients cannot be accumulated over {batch.accumulation} micro-batches, as each is "
            "used when it is complete: let train_micro_batch_size_per_gpu times the ranks be train_batch_size, with "
            "--gradient_checkpointing if the activations do not fit"
        )


def clipping(config: dict[str, Any]) -> float:
    """Norm that gradients are clipped at, 0.0 for none; where the JSON names none, DeepSpeed's default."""
    from deepspeed.runtime.constants import GRADIENT_CLIPPING, GRADIENT_CLIPPING_DEFAULT

    return float(config.get(GRADIENT_CLIPPING, GRADIENT_CLIPPING_DEFAULT))


def sixteen_bit_weights(config: dict[str, Any]) -> bool:
    """Whether the weights that are stepped are bf16 themselves, without an fp32 copy."""
    return (config["optimizer"].get("params") or {}).get("weights") in SIXTEEN


def check_native(backend: str, config: dict[str, Any]) -> None:
    """Raise a ConfigError if the JSON asks for what the backends without DeepSpeed cannot do."""
    if precision(config) == "fp16":
        raise ConfigError(f"--backend {backend}: fp16 is not supported; enable bf16, or use --backend deepspeed")
    kind = config["optimizer"]["type"]
    if kind not in CONFIGS:
        raise ConfigError(
            f"--backend {backend}: optimizer.type {kind!r} is not supported; take one of {', '.join(CONFIGS)}, or "
            "--backend deepspeed"
        )
    if sixteen_bit_weights(config) and precision(config) != "bf16":
        weights = config["optimizer"]["params"]["weights"]
        raise ConfigError(
            f"--backend {backend}: optimizer.params.weights={weights!r} is for bf16 weights; set bf16.enabled to true"
        )


def ignored(config: dict[str, Any]) -> list[str]:
    """Top-level keys of the JSON that mean something to DeepSpeed only."""
    return sorted(config.keys() - NATIVE)


def model_axes(config: dict[str, Any]) -> dict[str, int]:
    """Stages of the pipeline and tensor-parallel ranks that the JSON names, 1 where it names none."""
    stages = (config.get("pipeline") or {}).get("stages")
    parts = (config.get("tensor_parallel") or {}).get("autotp_size")
    return {name: n if type(n) is int and n > 0 else 1 for name, n in (("pipeline", stages), ("tensor", parts))}


def batch_sizes(config: dict[str, Any], world_size: int) -> BatchSizes:
    """Fill in the one of the three batch settings that the JSON leaves out, as DeepSpeed does.

    Raises:
        ConfigError: too few of them, or ``train_batch_size != micro batch * accumulation * world_size``.
    """
    total, micro, accumulation = (config.get(name) for name in BATCH_SIZES)
    if micro is None:
        if total is None:
            raise ConfigError("the DeepSpeed JSON needs train_batch_size or train_micro_batch_size_per_gpu")
        micro = total // ((accumulation or 1) * world_size)
    if accumulation is None:
        accumulation = 1 if total is None else total // (max(micro, 1) * world_size)
    if total is None:
        total = micro * accumulation * world_size
    given = [f"{name}={config[name]}" for name in BATCH_SIZES if config.get(name) is not None]
    if micro < 1 or accumulation < 1 or micro * accumulation * world_size != total:
        raise ConfigError(
            f"{', '.join(given)} cannot be met on {world_size} ranks: train_batch_size must be "
            "micro batch x accumulation x ranks; change one of them"
        )
    return BatchSizes(total, micro, accumulation)
