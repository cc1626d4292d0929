"""SGD with a low-rank momentum."""

from __future__ import annotations

from ..config import LoRAPreSGDConfig
from ..core.rules.momentum import Momentum
from ..core.step import Rule
from .momentum import MomentumOptimizer, regression


class LoRAPreSGD(MomentumOptimizer):
    """SGD with a low-rank heavy-ball momentum, AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreSGDConfig`.
    """

    config_class = LoRAPreSGDConfig

    @staticmethod
    def rule(config: LoRAPreSGDConfig) -> Rule:
        """How a group's matrices are stepped, from its settings."""
        mu = config.momentum
        return Momentum(
            lr=lambda shape: config.lr,
            decay=config.lr * config.weight_decay,
            keep=mu**2 if config.nesterov else mu,
            fresh=1 + mu if config.nesterov else 1.0,
            residual=config.resolved_residual / (1 - mu),
            regression=regression(config, 1 / (1 - mu)),
        )
