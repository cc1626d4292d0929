"""The relatives of :mod:`lorapre_dist.bench.family` as contenders."""

from __future__ import annotations

from torch.optim import Optimizer

from lorapre_dist.bench.family.dense import Dense
from lorapre_dist.bench.family.dion import Dion
from lorapre_dist.bench.family.hfac import HFac
from lorapre_dist.bench.family.mlorc import MLorc
from lorapre_dist.bench.family.mofasgd import MoFaSGD
from lorapre_dist.bench.family.smmf import SMMF
from lorapre_dist.bench.training import BETAS, EPS

from .contender import ADAM_LRS, MUON_LRS, Contender, Matrices

HERE = "bench/family"


def dion(matrices: Matrices, lr: float) -> Optimizer:
    """Dion with its paper's mu."""
    return Dense(matrices.params, lr, Dion(matrices.rank))


def mofasgd(matrices: Matrices, lr: float) -> Optimizer:
    """MoFaSGD."""
    return Dense(matrices.params, lr, MoFaSGD(matrices.rank))


def mlorc(matrices: Matrices, lr: float) -> Optimizer:
    """MLorc-AdamW with the betas of every other row."""
    return Dense(matrices.params, lr, MLorc(matrices.rank, BETAS, EPS))


def smmf(matrices: Matrices, lr: float) -> Optimizer:
    """SMMF."""
    return Dense(matrices.params, lr, SMMF())


def hfac(matrices: Matrices, lr: float) -> Optimizer:
    """H-Fac."""
    return Dense(matrices.params, lr, HFac())


RELATIVES = {
    "dion-8": Contender("Dion", dion, MUON_LRS, 8, origin=HERE),
    "mlorc-8": Contender("MLorc", mlorc, ADAM_LRS, 8, origin=HERE),
    "mofasgd-8": Contender("MoFaSGD", mofasgd, MUON_LRS, 8, origin=HERE),
    "smmf": Contender("SMMF", smmf, ADAM_LRS, origin=HERE),
    "h-fac": Contender("H-Fac", hfac, ADAM_LRS, origin=HERE),
}
