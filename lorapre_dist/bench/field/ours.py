"""Our own optimizers as contenders; ``scale`` is 1, so that the learning rate means what it means for AdamW."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lorapre_dist.bench.family.dense import Dense
from lorapre_dist.bench.family.exchanged import Exchanged
from lorapre_dist.bench.training import BETAS, EPS
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.optimizers import OPTIMIZERS

from .contender import ADAM_LRS, LION_LRS, MUON_LRS, Contender, Matrices


def lorapre(name: str, share: int) -> Contender:
    """LoRAPre or LoRAPreAdafactor with the defaults of the ``stable`` variant."""

    def build(matrices: Matrices, lr: float, **options: Any) -> Optimizer:
        given: dict[str, Any] = {"betas": BETAS, "eps": EPS, "scale": 1.0, "rank": matrices.rank} | options
        return OPTIMIZERS[name]([{"params": matrices.named}], lr=lr, **given)

    return Contender(name, build, ADAM_LRS, share, origin="lorapre_dist")


def exchanged(share: int) -> Contender:
    """LoRAPre on whole matrices with a part exchanged: options are ``residual`` and those of :class:`Exchanged`."""

    def build(matrices: Matrices, lr: float, residual: float | None = None, **options: Any) -> Optimizer:
        config = LoRAPreConfig(betas=BETAS, eps=EPS, scale=1.0, rank=matrices.rank, residual=residual)
        return Dense(matrices.params, lr, Exchanged(config, **options))

    return Contender("LoRAPre", build, ADAM_LRS, share, origin="bench/family")


def paper(share: int) -> Contender:
    """LoRAPre as it is printed."""

    def build(matrices: Matrices, lr: float, **options: Any) -> Optimizer:
        given: dict[str, Any] = {"betas": BETAS, "eps": EPS, "scale": 1.0, "variant": "paper"} | options
        return OPTIMIZERS["LoRAPre"]([{"params": matrices.named}], lr=lr, rank=matrices.rank, **given)

    return Contender("LoRAPre, paper variant", build, (0.00005, 0.0001, 0.0002, 0.0004), share, origin="lorapre_dist")


def muon(share: int) -> Contender:
    """LoRAPreMuon with its defaults, but for weight decay, which no row has."""

    def build(matrices: Matrices, lr: float, **options: Any) -> Optimizer:
        given: dict[str, Any] = {"weight_decay": 0.0, "rank": matrices.rank} | options
        return OPTIMIZERS["LoRAPreMuon"]([{"params": matrices.named}], lr=lr, **given)

    return Contender("LoRAPreMuon", build, MUON_LRS, share, origin="lorapre_dist")


def lion(share: int) -> Contender:
    """LoRAPreLion with its defaults."""

    def build(matrices: Matrices, lr: float, **options: Any) -> Optimizer:
        return OPTIMIZERS["LoRAPreLion"]([{"params": matrices.named}], lr=lr, rank=matrices.rank, **options)

    return Contender("LoRAPreLion", build, LION_LRS, share, origin="lorapre_dist")
