"""Lion with a low-rank momentum."""

from __future__ import annotations

from ..config import LoRAPreLionConfig
from ..core.rules.momentum import Momentum
from ..core.step import Rule
from .momentum import MomentumOptimizer, regression


class LoRAPreLion(MomentumOptimizer):
    """Lion (arXiv 2302.06675) with a low-rank momentum, AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreLionConfig`.
    """

    config_class = LoRAPreLionConfig

    @staticmethod
    def rule(config: LoRAPreLionConfig) -> Rule:
        """How a group's matrices are stepped, from its settings."""
        beta1, _ = config.betas
        return Momentum(
            lr=lambda shape: config.lr,
            decay=config.lr * config.weight_decay,
            keep=beta1,
            fresh=1 - beta1,
            residual=config.resolved_residual,
            regression=regression(config, 1.0),
            sign=True,
        )
