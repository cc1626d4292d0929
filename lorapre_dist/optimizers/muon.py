"""Muon with a low-rank momentum."""

from __future__ import annotations

from ..config import LoRAPreMuonConfig
from ..core import momentum
from ..core.factors import Matrix
from ..core.newton_schulz import NewtonSchulz
from ..core.workspace import Workspace
from .momentum import MomentumOptimizer


class LoRAPreMuon(MomentumOptimizer):
    """Muon with a low-rank heavy-ball momentum (arXiv 2602.24283, Algorithm 2), AdamW for every other parameter.

    The arguments are those of :class:`lorapre_dist.optimizer.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreMuonConfig`. Matrices are orthogonalised where they lie, by Newton-Schulz in fp32
    on a CPU and in fp16 on GPUs (fp64 for fp64 parameters).
    """

    config_class = LoRAPreMuonConfig
    #: Buckets large enough that all ranks have matrices to iterate on.
    workspace_limits = Workspace(bucket=256 << 20)

    def workspace_bytes(self, matrices: list[Matrix]) -> int:
        """Bound on what a step allocates for itself."""
        return momentum.workspace_bytes(matrices, self.workspace, _newton_schulz(self.config))

    @staticmethod
    def matrix_hyper(config: LoRAPreMuonConfig) -> momentum.Hyper:
        """The numbers that the core needs from a group's settings."""
        mu = config.momentum
        # u = (1 - mu) m, or with Nesterov (1 - mu) (mu m + g): torch.optim.Muon's scale, hence its eps as well.
        keep, fresh = (mu**2, 1 + mu) if config.resolved_nesterov else (mu, 1.0)
        return momentum.Hyper(
            lr=config.adjusted_lr,
            decay=config.lr * config.weight_decay,
            keep=(1 - mu) * keep,
            fresh=(1 - mu) * fresh,
            residual=config.resolved_residual,
            gamma=config.resolved_gamma,
            target=1 / (1 - mu),
            damping=config.resolved_damping,
            stable=config.variant == "stable",
            orthogonal=_newton_schulz(config),
        )


def _newton_schulz(config: LoRAPreMuonConfig) -> NewtonSchulz:
    return NewtonSchulz(config.ns_coefficients, config.ns_steps, config.eps)
