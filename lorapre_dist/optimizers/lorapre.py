"""Adam with low-rank momenta."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Never

from ..config import LoRAPreConfig
from ..core.regression import Regression
from ..core.rules import adamw
from ..core.rules.adam import Adam
from ..core.step import Rule
from .base import LowRankOptimizer
from .tensors import given

if TYPE_CHECKING:
    from typing_extensions import Self


class AdamOptimizer(LowRankOptimizer):
    """A :class:`LowRankOptimizer` with Adam's options, and AdamW at the same ``lr`` for every other parameter."""

    adam: ClassVar[type[Adam]] = Adam

    @classmethod
    def from_adamw(
        cls,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> Self:
        """The optimizer for a program that had ``torch.optim.AdamW``, with the arguments and defaults of that.

        ``scale`` is 1, so that matrices take updates of AdamW's size at AdamW's ``lr``. Other ``options`` are those of
        the class.
        """
        return cls(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **{"scale": 1.0, **options})

    @classmethod
    def rule(cls, config: LoRAPreConfig) -> Rule:
        """How a group's matrices are stepped, from its settings."""
        gammas = config.resolved_gammas[: len(config.ranks)]
        return cls.adam(
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            scale=config.scale,
            residual=config.resolved_residual,
            max_update=config.resolved_max_update,
            regression=Regression(gammas, config.resolved_damping, config.variant == "stable"),
            kernels=config.kernels,
        )

    @staticmethod
    def vector_hyper(config: LoRAPreConfig, group: dict[str, Any]) -> adamw.Hyper:
        """The numbers that AdamW needs for the group's other parameters."""
        return adamw.Hyper(config.lr, config.betas, config.eps, config.weight_decay)


class LoRAPre(AdamOptimizer):
    """Adam with low-rank momenta (LoRA-Pre, arXiv 2602.24283), AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreConfig`.
    """

    config_class = LoRAPreConfig

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        rank_v: int | None = None,
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
        gammas: tuple[float, float] | None = None,
        shard_state: bool = True,
        **unknown: Never,
    ) -> None:
        super().__init__(params, **given(locals()))
