"""Contenders out of torch and other packages, none of which is copied; each keeps its own defaults but for lr and rank.

Where an optimizer takes Adam's betas and epsilon, they are those of every other row. Weight decay is 0 everywhere.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorapre_dist.bench.training import BETAS, EPS
from lorapre_dist.config import ConfigError

from .contender import ADAM_LRS, LION_LRS, MUON_LRS, Build, Contender, Matrices

ADAM = {"betas": BETAS, "eps": EPS, "weight_decay": 0.0}
PROJECTED_LRS = (0.00125, 0.0025, 0.005, 0.01)
#: GaLore's own choice of steps between two projections.
GAP = 200


def plain(module: str, name: str, **options: Any) -> Build:
    """Builder of the class ``name`` of ``module`` on the matrices in one group."""

    def build(matrices: Matrices, lr: float, **given: Any) -> Optimizer:
        return _class(module, name)(matrices.params, lr=lr, **options | given)

    return build


def grouped(module: str, name: str, group: dict[str, Any], **options: Any) -> Build:
    """As :func:`plain`, with what the parameter group says beside the matrices; of projections also their rank."""

    def build(matrices: Matrices, lr: float) -> Optimizer:
        rank = {"rank": matrices.rank} if matrices.rank else {}
        return _class(module, name)([{"params": matrices.params, **rank, **group}], lr=lr, **options)

    return build


def _class(module: str, name: str) -> Callable[..., Optimizer]:
    # bitsandbytes, which several import, warns of kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return getattr(importlib.import_module(module), name)


def alice(matrices: Matrices, lr: float) -> Optimizer:
    """Alice, a fifth of its rank switched among the other directions, as 40 of 256 are by its authors."""
    leading = max(1, matrices.rank * 40 // 256)
    cls = _class(PO, "Alice")
    return cls(matrices.params, lr=lr, rank=matrices.rank, leading_basis=leading, update_interval=GAP)


class Named(nn.Module):
    """The matrices with their names, for an optimizer that asks a model for its parameters."""

    def __init__(self, matrices: Matrices) -> None:
        super().__init__()
        self.named = matrices.named

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The matrices."""
        return iter(self.named)


def adam_mini(matrices: Matrices, lr: float) -> Optimizer:
    """Adam-mini, which goes by the parameters' names and the number of heads."""
    config = matrices.config
    sizes = {"num_embeds": config.hidden_size, "num_heads": config.num_attention_heads}
    return _class(PO, "AdamMini")(Named(matrices), lr=lr, **sizes, **ADAM)


def of(package: str, module: str, label: str, build: Build, lrs: tuple[float, ...], **more: Any) -> Contender:
    """A contender of another distribution."""
    return Contender(label, build, lrs, package=package, modules=(module,), **more)


PO = "pytorch_optimizer"
BNB = "bitsandbytes"
AO = "torchao"


def _po(name: str, label: str, lrs: tuple[float, ...], **options: Any) -> Contender:
    return of("pytorch-optimizer", PO, label, plain(PO, name, **options), lrs)


def _apollo(label: str, share: int | None, scale_type: str, scale: float, lrs: tuple[float, ...]) -> Contender:
    group = {"update_proj_gap": GAP, "scale": scale, "projection_type": "std"}
    build = grouped(PO, "APOLLO", group, scale_type=scale_type, **ADAM)
    return of("pytorch-optimizer", PO, label, build, lrs, share=share)


TORCH = {
    "adamw": Contender("AdamW", plain("torch.optim", "AdamW", **ADAM), ADAM_LRS),
    "muon": Contender("Muon", plain("torch.optim", "Muon", weight_decay=0.0), MUON_LRS, iterates_in_bf16=True),
    "adafactor": Contender("Adafactor", plain("torch.optim", "Adafactor", weight_decay=0.0), (0.005, 0.01, 0.02, 0.04)),
}

_GALORE = {"update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
_FIRA = {"update_proj_gap": GAP, "alpha": 1.0, "proj_type": "std"}
_QUIET = {"no_deprecation_warning": True}


def _galore(share: int) -> Contender:
    build = grouped("galore_torch", "GaLoreAdamW", _GALORE, **ADAM, **_QUIET)
    return of("galore-torch", "galore_torch", "GaLore", build, PROJECTED_LRS, share=share)


def _fira(share: int) -> Contender:
    build = grouped("fira", "FiraAdamW", _FIRA, **ADAM, **_QUIET)
    return of("fira", "fira", "Fira", build, ADAM_LRS, share=share)


def _ista(label: str, lrs: tuple[float, ...]) -> Contender:
    why = "its package imports ista_daslab_cuda_tools, which is built by CUDA's compiler; not tried on a GPU yet"

    def build(matrices: Matrices, lr: float) -> Optimizer:
        raise ConfigError(f"{label}: {why}")

    return Contender(label, build, lrs, 8, package="ista-daslab-optimizers", cannot=why)


PACKAGES = {
    "galore-8": _galore(8),
    "apollo-8": _apollo("APOLLO", 8, "channel", 1.0, PROJECTED_LRS),
    "fira-8": _fira(8),
    "apollo-mini": _apollo("APOLLO-Mini", 128, "tensor", 128**0.5, PROJECTED_LRS),
    "conda": _po("Conda", "Conda", ADAM_LRS, update_proj_gap=GAP, **ADAM),
    "soap": _po("SOAP", "SOAP", ADAM_LRS, weight_decay=0.0),
    "came": _po("CAME", "CAME", ADAM_LRS),
    "adam-mini": of("pytorch-optimizer", PO, "Adam-mini", adam_mini, ADAM_LRS),
    "normuon": of("pytorch-optimizer", PO, "NorMuon", grouped(PO, "NorMuon", {"use_muon": True}), MUON_LRS),
    "lion": _po("Lion", "Lion", LION_LRS),
    "racs": _po("RACS", "RACS", (0.01, 0.02, 0.04, 0.08)),
    "alice-8": of("pytorch-optimizer", PO, "Alice", alice, (0.005, 0.01, 0.02, 0.04), share=8),
    "adamw-8bit-bnb": of(
        BNB, BNB, "AdamW, 8 bits (bitsandbytes)", plain("bitsandbytes.optim", "AdamW8bit", **ADAM), ADAM_LRS
    ),
    "adamw-8bit-ao": of(AO, AO, "AdamW, 8 bits (torchao)", plain("torchao.optim", "AdamW8bit", **ADAM), ADAM_LRS),
    "adamw-4bit-ao": of(AO, AO, "AdamW, 4 bits (torchao)", plain("torchao.optim", "AdamW4bit", **ADAM), ADAM_LRS),
    "galore-32": _galore(32),
    "apollo-32": _apollo("APOLLO", 32, "channel", 1.0, PROJECTED_LRS),
    "fira-32": _fira(32),
    "trion-8": _ista("Trion", MUON_LRS),
    "dct-adamw-8": _ista("DCT-AdamW", PROJECTED_LRS),
}
