"""A DeepSpeed configuration as its users give it: read as DeepSpeed reads it, and checked without importing it."""

from __future__ import annotations

import base64
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import extras, shipped
from .checks import ConfigError

BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16"}
#: Where ``"auto"`` is a value that DeepSpeed understands. Elsewhere it takes its own default, in silence.
_AUTO = (
    *("pipeline.", "data_types.keep_in_fp32_modules", "autotuning.", "expert_parallel."),
    "zero_optimization.zenflow.",
)


def read(source: str | Path) -> dict[str, Any]:
    """The configuration in a file, or in a string in base64, as DeepSpeed takes it: Hjson, which JSON is a part of.

    The name of a shipped configuration (:mod:`.shipped`) stands for its file.

    Raises:
        ConfigError: no such file, not a JSON object, a key given twice. It does not name the file, see :func:`naming`.
    """
    extras.need("deepspeed", "hjson")
    import hjson

    text = _text(shipped.located(source))
    try:
        config = hjson.loads(text, object_pairs_hook=_unique_keys)
    except ConfigError:
        raise
    except Exception as error:  # the parser meets damaged text with IndexError, OverflowError, RecursionError, ...
        raise ConfigError(f"not JSON: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"must hold a JSON object, not {type(config).__name__}")
    return config


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put ``where`` before the message of a ConfigError that the block raises."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def check_values(config: Mapping[str, Any]) -> None:
    """Check what DeepSpeed would take for something else, or stumble over later.

    Raises:
        ConfigError: an ``"auto"`` that nobody filled in, a section, switch or number of another type.
    """
    for path, value in _values(config):
        if isinstance(value, str) and value == "auto" and not path.startswith(_AUTO):
            raise ConfigError(f"{path} is 'auto', which nothing here fills in: give a value")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ConfigError(f"{path}: a number of {len(str(value))} digits")
    for name in ("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "zero_optimization"):
        section = config.get(name)
        old_switch = name == "zero_optimization" and isinstance(section, bool)
        if not (section is None or isinstance(section, Mapping) or old_switch):
            raise ConfigError(f"{name}={section!r}: must be a JSON object")
        enabled = section.get("enabled", False) if isinstance(section, Mapping) else False
        if name in PRECISIONS and not isinstance(enabled, bool):
            raise ConfigError(f"{name}.enabled={enabled!r}: must be true or false")
    _check_optimizer(config.get("optimizer"))
    _check_stage(config.get("zero_optimization"))
    for name in BATCH_SIZES:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: must be a positive integer")
    for name in ("gradient_clipping", "steps_per_print"):  # Accelerate prints at infinity
        value = config.get(name, 1)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
        if not (ok and (name == "steps_per_print" or value < math.inf)) and (name, value) != ("steps_per_print", None):
            raise ConfigError(f"{name}={value!r}: must be a number, 0 for none")


def zero_stage(config: Mapping[str, Any]) -> int:
    """ZeRO stage, 0 where the configuration names none."""
    section = config.get("zero_optimization") or {}
    return int(section) if isinstance(section, bool) else section.get("stage", 0)


def precision(config: Mapping[str, Any]) -> str:
    """``"bf16"``, ``"fp16"`` or ``"fp32"``: the type that the model computes in."""
    for name, kind in PRECISIONS.items():
        if (config.get(name) or {}).get("enabled", False):
            return kind
    return "fp32"


def _text(source: str | Path) -> str:
    try:
        if os.path.exists(source):
            return Path(source).read_text(encoding="utf-8")
        return base64.b64decode(str(source), altchars=b"-_", validate=True).decode()
    except ValueError as error:  # of UTF-8 or base64
        if os.path.exists(source):
            raise ConfigError(f"not text in UTF-8: {error}") from error
        raise ConfigError(f"no such file{shipped.nearest(source)}") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the key {twice!r} is given twice")
    return result


def _values(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no section itself, with its path."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_optimizer(section: Mapping[str, Any] | None) -> None:
    if section is None:
        return
    if not isinstance(section.get("type"), str):
        raise ConfigError(f"optimizer.type={section.get('type')!r}: must be the name of an optimizer, 'LoRAPre' say")
    if not isinstance(section.get("params") or {}, Mapping):
        raise ConfigError(f"optimizer.params={section['params']!r}: must be a JSON object")


def _check_stage(section: Mapping[str, Any] | bool | None) -> None:
    if isinstance(section, Mapping):
        stage = section.get("stage", 0)
        if isinstance(stage, bool) or not isinstance(stage, int) or stage not in range(4):
            raise ConfigError(f"zero_optimization.stage={stage!r}: must be 0, 1, 2 or 3")
