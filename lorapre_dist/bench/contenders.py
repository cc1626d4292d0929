"""The optimizers that ``bench quality`` compares: each steps the matrices in its own way, and the rest by AdamW."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer

from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.param_groups import param_groups
from lorapre_dist.optimizers import OPTIMIZERS, LoRAPre, LoRAPreAdafactor

BASE_LR = 0.01
BETAS = (0.9, 0.99)
EPS = 1e-8
LORAPRE_LRS = (0.0005, 0.001, 0.002)
MUON_LRS = (0.005, 0.01, 0.02)


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        label: in the table.
        build: optimizer of (model, lr of the matrices).
        lrs: lrs of the matrices that are tried.
        rank: of the first moment; of GaLore's projection; None for AdamW.
        rank_v: of the second moment; None where it has no rank of its own.
    """

    label: str
    build: Callable[[nn.Module, float], Optimizer]
    lrs: tuple[float, ...]
    rank: int | None = None
    rank_v: int | None = None


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """``torch.optim.AdamW`` for everything, the matrices at ``lr``."""
    matrices, rest = split(model)
    groups = [{"params": matrices, "lr": lr}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=BASE_LR, betas=BETAS, eps=EPS, weight_decay=0.0)


def lorapre(cls: type[Optimizer] = LoRAPre, **options: Any) -> Callable[[nn.Module, float], Optimizer]:
    """Builder of :class:`lorapre_dist.LoRAPre`, or ``cls``, with ``options``."""

    def build(model: nn.Module, lr: float) -> Optimizer:
        kept: dict[str, Any] = {"lr": BASE_LR, "betas": BETAS, "eps": EPS, "scale": lr / BASE_LR}
        return cls(param_groups(model), **kept, **options)

    return build


class MuonAndAdamW(Optimizer):
    """``torch.optim.Muon`` for the matrices at ``lr``, AdamW for the rest.

    Muon iterates in bf16, for which CPUs have no fast products; here it does in fp32, as LoRAPreMuon on a CPU.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        matrices, rest = split(model)
        super().__init__([{"params": matrices, "lr": lr}, {"params": rest, "lr": BASE_LR}], {})
        # Each takes the very group of ours, so that a schedule of ours is theirs.
        self.muon = torch.optim.Muon([self.param_groups[0]], weight_decay=0.0)
        self.adamw = torch.optim.AdamW([self.param_groups[1]], betas=BETAS, eps=EPS, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both steps."""
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            self.muon.step()
        self.adamw.step()


def momentum_row(name: str, label: str, lrs: tuple[float, ...], **options: Any) -> Row:
    """A contender of ours with one factored moment; ``options`` are those of its settings."""

    def build(model: nn.Module, lr: float) -> Optimizer:
        other = {"adamw_lr": BASE_LR, "adamw_betas": BETAS, "adamw_eps": EPS, "weight_decay": 0.0}
        return OPTIMIZERS[name](param_groups(model), lr=lr, **other, **options)

    return Row(label, build, lrs, options["rank"])


def galore(rank: int) -> Callable[[nn.Module, float], Optimizer]:
    """Builder of ``galore_torch.GaLoreAdamW`` with the parameter groups of its README."""

    def build(model: nn.Module, lr: float) -> Optimizer:
        # bitsandbytes, which galore-torch imports, warns of kernels that are not used here.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from galore_torch import GaLoreAdamW

        matrices, rest = split(model)
        projected = {"rank": rank, "update_proj_gap": 200, "scale": lr / BASE_LR, "proj_type": "std"}
        groups = [{"params": rest}, {"params": matrices, **projected}]
        return GaLoreAdamW(groups, lr=BASE_LR, betas=BETAS, eps=EPS, weight_decay=0.0, no_deprecation_warning=True)

    return build


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The attention and MLP matrices, and every other parameter: LoRAPre's own choice, for all contenders."""
    groups = param_groups(model)
    matrices, rest = ([p for _, p in group["params"]] for group in groups)
    return matrices, rest


def lorapre_row(label: str, lrs: tuple[float, ...], **options: Any) -> Row:
    """A LoRAPre contender; ``options`` are those of :class:`lorapre_dist.config.LoRAPreConfig`."""
    config = LoRAPreConfig(**options)
    return Row(label, lorapre(**options), lrs, config.rank, config.resolved_rank_v)


ROWS = {
    "adamw": Row("AdamW", adamw, (0.0005, 0.001, 0.002)),
    "stable-r16": lorapre_row("LoRAPre stable", LORAPRE_LRS, rank=16),
    "stable-r4": lorapre_row("LoRAPre stable", LORAPRE_LRS, rank=4),
    # Both bracket the best lr and hold 0.0025, the scale of 0.25 that the two papers train with.
    "paper-r16": lorapre_row("LoRAPre paper", (0.0001, 0.0002, 0.0025), rank=16, variant="paper"),
    "galore-r16": Row("GaLore", galore(16), (0.0025, 0.005, 0.01), 16),
    "muon": Row("Muon", MuonAndAdamW, MUON_LRS),
    "lorapre-muon-r16": momentum_row("LoRAPreMuon", "LoRAPreMuon stable", MUON_LRS, rank=16),
    "lorapre-muon-r4": momentum_row("LoRAPreMuon", "LoRAPreMuon stable", MUON_LRS, rank=4),
    "lorapre-muon-paper-r16": momentum_row("LoRAPreMuon", "LoRAPreMuon paper", MUON_LRS, rank=16, variant="paper"),
    "lorapre-lion-r16": momentum_row("LoRAPreLion", "LoRAPreLion stable", (0.0001, 0.0002, 0.0005), rank=16),
    "lorapre-adafactor-r16": Row("LoRAPreAdafactor", lorapre(LoRAPreAdafactor, rank=16), LORAPRE_LRS, 16),
    "lorapre-sgd-r16": momentum_row("LoRAPreSGD", "LoRAPreSGD stable", (0.1, 0.3, 1.0), rank=16),
}
