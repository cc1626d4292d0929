"""SGD with a low-rank momentum."""

from __future__ import annotations

from ..config import LoRAPreSGDConfig
from ..core import momentum
from .momentum import MomentumOptimizer


class LoRAPreSGD(MomentumOptimizer):
    """SGD with a low-rank heavy-ball momentum, AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizer.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreSGDConfig`.
    """

    config_class = LoRAPreSGDConfig

    @staticmethod
    def matrix_hyper(config: LoRAPreSGDConfig) -> momentum.Hyper:
        """The numbers that the core needs from a group's settings."""
        mu = config.momentum
        return momentum.Hyper(
            lr=lambda shape: config.lr,
            decay=config.lr * config.weight_decay,
            keep=mu**2 if config.nesterov else mu,
            fresh=1 + mu if config.nesterov else 1.0,
            residual=config.resolved_residual / (1 - mu),
            gamma=config.resolved_gamma,
            target=1 / (1 - mu),
            damping=config.resolved_damping,
            stable=config.variant == "stable",
        )
