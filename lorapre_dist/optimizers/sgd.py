"""SGD with a low-rank momentum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Never

from ..config import LoRAPreSGDConfig
from ..core.rules.momentum import Momentum
from ..core.step import Rule
from .momentum import MomentumOptimizer, regression
from .tensors import given


class LoRAPreSGD(MomentumOptimizer):
    """SGD with a low-rank heavy-ball momentum, AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreSGDConfig`.
    """

    config_class = LoRAPreSGDConfig

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.001,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        variant: str = "stable",
        residual: float | None = None,
        damping: float | None = None,
        init_std: float = 0.02,
        target_modules: str | Sequence[str] | None = None,
        seed: int = 0,
        max_skipped: int = 20,
        state_dtype: str = "fp32",
        other_state: str = "adamw",
        embeddings: str = "full",
        release_gradients: bool = False,
        clip_each: float | None = None,
        weights: str | None = None,
        work: str = "rows",
        overlap: bool = False,
        overlap_limit: int | None = None,
        kernels: str = "auto",
        gamma: float | None = None,
        adamw_lr: float = 0.001,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-08,
        adamw_weight_decay: float = 0.0,
        nesterov: bool = False,
        shard_state: bool = True,
        **unknown: Never,
    ) -> None:
        super().__init__(params, **given(locals()))

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
