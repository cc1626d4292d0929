"""LoRA-Pre as a ZeRO-aware optimizer for DeepSpeed and torch.optim users. See README.md."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from . import reference
from .config import (
    ConfigError,
    LoRAPreAdafactorConfig,
    LoRAPreConfig,
    LoRAPreLionConfig,
    LoRAPreMuonConfig,
    LoRAPreSGDConfig,
)
from .optimizer import NonFiniteError
from .optimizers import LoRAPre, LoRAPreAdafactor, LoRAPreLion, LoRAPreMuon, LoRAPreSGD
from .param_groups import param_groups

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "LoRAPre",
    "LoRAPreAdafactor",
    "LoRAPreAdafactorConfig",
    "LoRAPreConfig",
    "LoRAPreLion",
    "LoRAPreLionConfig",
    "LoRAPreMuon",
    "LoRAPreMuonConfig",
    "LoRAPreSGD",
    "LoRAPreSGDConfig",
    "NonFiniteError",
    "initialize",
    "param_groups",
    "reference",
]

if Path((sys.argv or [""])[0]).name in ("lorapre", "-m"):
    # The command ``lorapre`` prints results on stdout, where DeepSpeed says at import that it finds no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to" not in record.getMessage())

if importlib.util.find_spec("deepspeed"):
    from . import deepspeed
    from .deepspeed import initialize

    deepspeed.register()
else:

    def initialize(*_: Any, **__: Any) -> Any:
        """Needs DeepSpeed."""
        raise ImportError("lorapre_dist.initialize needs DeepSpeed: pip install deepspeed")
