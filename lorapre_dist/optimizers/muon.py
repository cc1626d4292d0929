"""Muon with a low-rank momentum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from typing_extensions import Never

from ..config import LoRAPreMuonConfig
from ..core import batching
from ..core.owning import Lies
from ..core.rules.momentum import Momentum
from ..core.rules.muon import cuts
from ..core.rules.muon.newton_schulz import NewtonSchulz
from ..core.rules.needs import MUON_SIZES
from ..core.step import Rule
from ..core.workspace import Workspace
from .momentum import MomentumOptimizer, regression
from .tensors import given


class LoRAPreMuon(MomentumOptimizer):
    """Muon with a low-rank heavy-ball momentum (arXiv 2602.24283, Algorithm 2), AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreMuonConfig`. Matrices are orthogonalised where they lie, by Newton-Schulz in fp32
    on a CPU and in fp16 on GPUs (fp64 for fp64 parameters).
    """

    config_class = LoRAPreMuonConfig
    workspace_limits = Workspace(**asdict(MUON_SIZES))

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.001,
        momentum: float | None = None,
        eps: float = 1e-07,
        weight_decay: float = 0.1,
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
        nesterov: bool | None = None,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        shard_state: bool = True,
        **unknown: Never,
    ) -> None:
        super().__init__(params, **given(locals()))

    def workspace_bytes(self, matrices: Sequence[Lies]) -> int:
        """Bound on what a step allocates for itself."""
        if not matrices:
            return 0
        kind, segments = self._device_kind(), _newton_schulz(self.config).segments()
        limit, itemsize = self.workspace.block_on(kind), matrices[0].outline.itemsize
        return batching.workspace_bytes(
            [matrix.outline for matrix in matrices],
            self.workspace,
            kind,
            cuts.PER_ELEMENT * itemsize,
            [cuts.transient_bytes(m.interval.shape, m.peers, itemsize, segments, limit) for m in matrices],
        )

    @staticmethod
    def rule(config: LoRAPreMuonConfig) -> Rule:
        """How a group's matrices are stepped, from its settings."""
        mu = config.resolved_momentum
        # u = (1 - mu) m, or with Nesterov (1 - mu) (mu m + g): torch.optim.Muon's scale, hence its eps as well.
        keep, fresh = (mu**2, 1 + mu) if config.resolved_nesterov else (mu, 1.0)
        return Momentum(
            lr=config.adjusted_lr,
            decay=config.lr * config.weight_decay,
            keep=(1 - mu) * keep,
            fresh=(1 - mu) * fresh,
            residual=config.resolved_residual,
            regression=regression(config, 1 / (1 - mu)),
            orthogonal=_newton_schulz(config),
        )


def _newton_schulz(config: LoRAPreMuonConfig) -> NewtonSchulz:
    return NewtonSchulz(config.ns_coefficients, config.ns_steps, config.eps)
