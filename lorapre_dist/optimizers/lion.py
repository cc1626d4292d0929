"""Lion with a low-rank momentum."""

from __future__ import annotations

from ..config import LoRAPreLionConfig
from ..core import momentum
from .momentum import MomentumOptimizer


class LoRAPreLion(MomentumOptimizer):
    """Lion (arXiv 2302.06675) with a low-rank momentum, AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizer.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreLionConfig`.
    """

    config_class = LoRAPreLionConfig

    @staticmethod
    def matrix_hyper(config: LoRAPreLionConfig) -> momentum.Hyper:
        """The numbers that the core needs from a group's settings."""
        beta1, _ = config.betas
        return momentum.Hyper(
            lr=lambda shape: config.lr,
            decay=config.lr * config.weight_decay,
            keep=beta1,
            fresh=1 - beta1,
            residual=config.resolved_residual,
            gamma=config.resolved_gamma,
            target=1.0,
            damping=config.resolved_damping,
            stable=config.variant == "stable",
            sign=True,
        )
