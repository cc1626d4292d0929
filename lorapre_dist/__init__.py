"""LoRA-Pre as a ZeRO-aware optimizer for DeepSpeed and torch.optim users. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import lazily, registration
from .config import (
    ConfigError,
    LoRAPreAdafactorConfig,
    LoRAPreConfig,
    LoRAPreLionConfig,
    LoRAPreMuonConfig,
    LoRAPreSGDConfig,
)
from .param_groups import param_groups

if TYPE_CHECKING:
    from . import deepspeed as deepspeed
    from . import reference
    from .deepspeed import initialize
    from .optimizer import NonFiniteError
    from .optimizers import LoRAPre, LoRAPreAdafactor, LoRAPreLion, LoRAPreMuon, LoRAPreSGD

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

# What imports torch, or DeepSpeed: see lorapre_dist.registration.
__getattr__, __dir__ = lazily.attributes(
    __name__,
    {
        **dict.fromkeys(("LoRAPre", "LoRAPreAdafactor", "LoRAPreLion", "LoRAPreMuon", "LoRAPreSGD"), "optimizers"),
        "NonFiniteError": "optimizer",
        "initialize": "deepspeed",
        "deepspeed": "deepspeed",
        "reference": "reference",
        "checkpoint": "checkpoint",
    },
)
registration.register()
