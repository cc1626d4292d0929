"""The optimizers by the name under which a DeepSpeed JSON asks for them."""

from __future__ import annotations

from .adafactor import LoRAPreAdafactor
from .base import LowRankOptimizer
from .lion import LoRAPreLion
from .lorapre import LoRAPre
from .muon import LoRAPreMuon
from .sgd import LoRAPreSGD

__all__ = ["OPTIMIZERS", "LoRAPre", "LoRAPreAdafactor", "LoRAPreLion", "LoRAPreMuon", "LoRAPreSGD", "LowRankOptimizer"]

OPTIMIZERS: dict[str, type[LowRankOptimizer]] = {
    cls.config_class.optimizer: cls for cls in (LoRAPre, LoRAPreMuon, LoRAPreSGD, LoRAPreLion, LoRAPreAdafactor)
}
