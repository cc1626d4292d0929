"""What the optimizers with one factored moment share: AdamW at its own learning rate for all other parameters."""

from __future__ import annotations

from typing import Any

from ..config import MomentumConfig
from ..config.checks import number
from ..core.regression import Regression
from ..core.rules import adamw
from .base import LowRankOptimizer
from .tensors import stays_on_device


class MomentumOptimizer(LowRankOptimizer):
    """A :class:`LowRankOptimizer` whose groups have ``adamw_lr`` beside ``lr``.

    Schedulers change ``lr`` alone; ``adamw_lr`` follows it in proportion to ``base_lr``, the group's first ``lr``.
    Where that is 0 (a warm-up by hand) it follows in proportion to ``peak_lr``: the largest ``lr`` so far, and no less
    than the optimizer's own, or its default. Either may be given in the group.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``; options of ``config_class`` in it override the defaults."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", float(self.group_config(group).lr))
        if not group["base_lr"]:
            group.setdefault("peak_lr", float(self.config.lr) or self.config_class.lr)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        number("base_lr", group.get("base_lr", 0.0), low=0.0)
        number("peak_lr", group.get("peak_lr", 1.0), low=0.0, low_open=True)

    @staticmethod
    def vector_hyper(config: MomentumConfig, group: dict[str, Any]) -> adamw.Hyper:
        """The numbers that AdamW needs for the group's other parameters.

        An ``lr`` on a device is not looked at: it does not raise ``peak_lr``.
        """
        if not group["base_lr"] and not stays_on_device(config.lr):
            group["peak_lr"] = max(group["peak_lr"], config.lr)
        lr = config.adamw_lr * (config.lr / (group["base_lr"] or group["peak_lr"]))
        return adamw.Hyper(lr, config.adamw_betas, config.adamw_eps, config.adamw_weight_decay)


def regression(config: MomentumConfig, target: float) -> Regression:
    """How the momentum follows ``target`` times the gradient."""
    return Regression((config.resolved_gamma,), config.resolved_damping, config.variant == "stable", target)
