"""DeepSpeed: its engines bind our optimizers, its JSON names them, its checkpoints hold their state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...config import lazily

if TYPE_CHECKING:
    from .bind import base_optimizer, check_config, engine_layout, initialize
    from .names import name_layers

__all__ = ["base_optimizer", "check_config", "engine_layout", "initialize", "name_layers"]

__getattr__, __dir__ = lazily.attributes(__name__, {**dict.fromkeys(__all__, "bind"), "name_layers": "names"})
