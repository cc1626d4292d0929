"""Lion with a low-rank momentum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Never

from ..config import LoRAPreLionConfig
from ..core.rules.momentum import Momentum
from ..core.step import Rule
from .momentum import MomentumOptimizer, regression
from .tensors import given


class LoRAPreLion(MomentumOptimizer):
    """Lion (arXiv 2302.06675) with a low-rank momentum, AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreLionConfig`.
    """

    config_class = LoRAPreLionConfig

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99),
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
        shard_state: bool = True,
        **unknown: Never,
    ) -> None:
        super().__init__(params, **given(locals()))

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
