"""What the optimizers with one factored moment share: AdamW at its own learning rate for all other parameters."""

from __future__ import annotations

from typing import Any

from ..config import MomentumConfig
from ..core import adamw
from ..core.regression import Regression
from ..optimizer import LowRankOptimizer


class MomentumOptimizer(LowRankOptimizer):
    """A :class:`LowRankOptimizer` whose groups have ``adamw_lr`` beside ``lr``.

    Schedulers change ``lr`` alone; ``adamw_lr`` follows it in proportion to ``base_lr``, the group's first ``lr``.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``; options of ``config_class`` in it override the defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", float(self.group_config(group).lr))

    @staticmethod
    def vector_hyper(config: MomentumConfig, group: dict[str, Any]) -> adamw.Hyper:
        """The numbers that AdamW needs for the group's other parameters."""
        other = config.adamw(group["base_lr"])
        return adamw.Hyper(other.lr, other.betas, other.eps, other.weight_decay)


def regression(config: MomentumConfig, target: float) -> Regression:
    """How the momentum follows ``target`` times the gradient."""
    return Regression((config.resolved_gamma,), config.resolved_damping, config.variant == "stable", target)
