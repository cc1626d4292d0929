"""The DeepSpeed JSON as the one source of batch sizes, optimizer and precision."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre_dist.config import CONFIGS, ConfigError

#: What the backends without DeepSpeed read, or can do without telling.
NATIVE = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "bf16", "bfloat16", "fp16", "steps_per_print"),
}


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per optimizer step, per forward pass and rank, and forward passes per step and rank."""

    global_batch: int
    micro_batch: int
    accumulation: int


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ConfigError: no such file, not a JSON object, a key given twice, a value ``"auto"``, no optimizer, or a
            scheduler (the program has its own).
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--deepspeed_config {path}: no such file")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {path}: cannot be read: {error}") from error
    try:
        config = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--deepspeed_config {path}: not JSON: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed_config {path}: must hold a JSON object, not {type(config).__name__}")
    _check_config(path, config)
    return config


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the key {twice!r} is given twice")
    return result


def _check_config(path: str, config: dict[str, Any]) -> None:
    auto = _find_auto(config)
    if auto:
        raise ConfigError(f"--deepspeed_config {path}: {auto} is 'auto'; give a value, this program fills in none")
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise ConfigError(f'--deepspeed_config {path}: needs "optimizer": {{"type": "LoRAPre", "params": {{...}}}}')
    if not isinstance(optimizer.get("params", {}), dict):
        raise ConfigError(f"--deepspeed_config {path}: optimizer.params must be a JSON object")
    if "scheduler" in config:
        raise ConfigError(
            f"--deepspeed_config {path}: remove 'scheduler': the program warms up over --warmup_steps and decays "
            "to a tenth of optimizer.params.lr by itself"
        )


def _find_auto(value: Any, prefix: str = "") -> str | None:
    if value == "auto":
        return prefix
    if isinstance(value, dict):
        for name, inner in value.items():
            found = _find_auto(inner, f"{prefix}.{name}" if prefix else name)
            if found:
                return found
    return None


def override_lr(config: dict[str, Any], lr: float) -> dict[str, Any]:
    """A copy of ``config`` with ``optimizer.params.lr`` set to ``lr``."""
    config = copy.deepcopy(config)
    config["optimizer"].setdefault("params", {})["lr"] = lr
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage, 0 where the JSON names none."""
    section = config.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    return stage if isinstance(stage, int) else 0


def precision(config: dict[str, Any]) -> str:
    """``"bf16"``, ``"fp16"`` or ``"fp32"``: the type that the model computes in."""
    for name, section in (("bf16", config.get("bf16", config.get("bfloat16"))), ("fp16", config.get("fp16"))):
        if isinstance(section, dict) and section.get("enabled") is True:
            return name
    return "fp32"


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
    clip = config.get("gradient_clipping", 0.0)
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0.0 <= clip < float("inf"):
        raise ConfigError(f"gradient_clipping={clip!r}: must be a number, 0 for none")


def ignored(config: dict[str, Any]) -> list[str]:
    """Top-level keys of the JSON that mean something to DeepSpeed only."""
    return sorted(config.keys() - NATIVE)


def batch_sizes(config: dict[str, Any], world_size: int) -> BatchSizes:
    """Fill in the one of the three batch settings that the JSON leaves out, as DeepSpeed does.

    Raises:
        ConfigError: a size that is no positive integer, too few of them, or
            ``train_batch_size != micro batch * accumulation * world_size``.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for name in names:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: must be a positive integer")
    total, micro, accumulation = (config.get(name) for name in names)
    if total is None and micro is None:
        raise ConfigError("the DeepSpeed JSON needs train_batch_size or train_micro_batch_size_per_gpu")
    if total is None:
        accumulation = accumulation or 1
        total = micro * accumulation * world_size
    elif micro is None:
        accumulation = accumulation or 1
        micro = total // (accumulation * world_size)
    elif accumulation is None:
        accumulation = total // (micro * world_size)
    given = [f"{name}={config[name]}" for name in names if config.get(name) is not None]
    if micro < 1 or accumulation < 1 or micro * accumulation * world_size != total:
        raise ConfigError(
            f"{', '.join(given)} cannot be met on {world_size} ranks: train_batch_size must be "
            "micro batch x accumulation x ranks; change one of them"
        )
    return BatchSizes(total, micro, accumulation)
