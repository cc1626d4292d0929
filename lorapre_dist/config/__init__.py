"""Settings: of the optimizers, of which parameters they take, and of the DeepSpeed JSON."""

from .checks import ConfigError, check_expression
from .options import (
    ADJUSTMENTS,
    CONFIGS,
    VARIANTS,
    LoRAPreAdafactorConfig,
    LoRAPreConfig,
    LoRAPreLionConfig,
    LoRAPreMuonConfig,
    LoRAPreSGDConfig,
    LowRankConfig,
    MomentumConfig,
)

__all__ = [
    "ADJUSTMENTS",
    "CONFIGS",
    "VARIANTS",
    "ConfigError",
    "LoRAPreAdafactorConfig",
    "LoRAPreConfig",
    "LoRAPreLionConfig",
    "LoRAPreMuonConfig",
    "LoRAPreSGDConfig",
    "LowRankConfig",
    "MomentumConfig",
    "check_expression",
]
