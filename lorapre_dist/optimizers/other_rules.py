"""How 2-D parameters are stepped that are no projections, where they do not take AdamW (``config/others.py``)."""

from __future__ import annotations

from ..config import LoRAPreConfig
from ..config.others import AdamW8bitConfig, Settings
from ..core.regression import Regression
from ..core.rules.adafactor import Adafactor
from ..core.rules.adam import Adam
from ..core.rules.adamw import Hyper
from ..core.rules.adamw8bit import AdamW8bit
from ..core.step import Rule


def other_rule(config: Settings) -> Rule:
    """The rule of such parameters, from their settings."""
    if isinstance(config, AdamW8bitConfig):
        return AdamW8bit(Hyper(config.lr, config.betas, config.eps, config.weight_decay))
    kind = Adam if isinstance(config, LoRAPreConfig) else Adafactor
    return kind(
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        scale=config.scale,
        residual=config.resolved_residual,
        max_update=config.resolved_max_update,
        regression=Regression(config.resolved_gammas[: len(config.ranks)], config.resolved_damping, stable=True),
    )
