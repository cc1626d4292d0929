"""LoRA-Pre as a ZeRO-aware optimizer for DeepSpeed and torch.optim users. See README.md and docs/."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import (
    ConfigError,
    LoRAPreAdafactorConfig,
    LoRAPreConfig,
    LoRAPreLionConfig,
    LoRAPreMuonConfig,
    LoRAPreSGDConfig,
    lazily,
)
from .config.param_groups import param_groups
from .integrations.deepspeed import register

if TYPE_CHECKING:
    from . import reference
    from .integrations import deepspeed  # noqa: F401
    from .integrations.deepspeed.bind import initialize
    from .optimizers import LoRAPre, LoRAPreAdafactor, LoRAPreLion, LoRAPreMuon, LoRAPreSGD
    from .optimizers.skipping import NonFiniteError

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

# What imports torch, or DeepSpeed: see lorapre_dist.integrations.deepspeed.register.
__getattr__, __dir__ = lazily.attributes(
    __name__,
    {
        **dict.fromkeys(("LoRAPre", "LoRAPreAdafactor", "LoRAPreLion", "LoRAPreMuon", "LoRAPreSGD"), "optimizers"),
        "NonFiniteError": "optimizers.skipping",
        "initialize": "integrations.deepspeed.bind",
        "deepspeed": "integrations.deepspeed",
        "reference": "reference",
        "checkpoint": "checkpoint",
    },
)
register.register()
