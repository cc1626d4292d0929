"""Adam with a low-rank first moment and Adafactor's second."""

from __future__ import annotations

from typing import Any

from ..config import LoRAPreAdafactorConfig
from ..core import adafactor, adam, adamw
from ..optimizer import LowRankOptimizer


class LoRAPreAdafactor(LowRankOptimizer):
    """:class:`lorapre_dist.LoRAPre` with row and column statistics for its second moment, AdamW for the rest.

    The arguments are those of :class:`lorapre_dist.optimizer.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreAdafactorConfig`.
    """

    config_class = LoRAPreAdafactorConfig
    core = adafactor

    @staticmethod
    def matrix_hyper(config: LoRAPreAdafactorConfig) -> adam.Hyper:
        """The numbers that the core needs from a group's settings."""
        return adam.Hyper(
            lr=config.lr,
            betas=config.betas,
            gammas=(config.resolved_gamma, 0.0),
            eps=config.eps,
            weight_decay=config.weight_decay,
            scale=config.scale,
            residual=config.resolved_residual,
            damping=config.resolved_damping,
            max_update=config.resolved_max_update,
            stable=config.variant == "stable",
        )

    @staticmethod
    def vector_hyper(config: LoRAPreAdafactorConfig, group: dict[str, Any]) -> adamw.Hyper:
        """The numbers that AdamW needs for the group's other parameters."""
        return adamw.Hyper(config.lr, config.betas, config.eps, config.weight_decay)
