"""Adam with a low-rank first moment and Adafactor's second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Never

from ..config import LoRAPreAdafactorConfig
from ..core.rules.adafactor import Adafactor
from .lorapre import AdamOptimizer
from .tensors import given


class LoRAPreAdafactor(AdamOptimizer):
    """:class:`lorapre_dist.LoRAPre` with row and column statistics for its second moment, AdamW for the rest.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreAdafactorConfig`.
    """

    config_class = LoRAPreAdafactorConfig
    adam = Adafactor

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
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
        scale: float = 0.25,
        max_update: float | None = None,
        gamma: float | None = None,
        shard_state: bool = True,
        **unknown: Never,
    ) -> None:
        super().__init__(params, **given(locals()))
