"""LoRA-Pre as a ZeRO-aware optimizer for DeepSpeed and torch.optim users. See README.md."""

from __future__ import annotations

import importlib.util
from typing import Any

from . import reference
from .config import ConfigError, LoRAPreConfig
from .optimizer import LoRAPre
from .param_groups import param_groups

__version__ = "0.1.0"
__all__ = ["ConfigError", "LoRAPre", "LoRAPreConfig", "initialize", "param_groups", "reference"]

if importlib.util.find_spec("deepspeed"):
    from . import deepspeed
    from .deepspeed import initialize

    deepspeed.register()
else:

    def initialize(*_: Any, **__: Any) -> Any:
        """Needs DeepSpeed."""
        raise ImportError("lorapre_dist.initialize needs DeepSpeed: pip install deepspeed")
