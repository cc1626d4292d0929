"""Adam with a low-rank first moment and Adafactor's second."""

from __future__ import annotations

from ..config import LoRAPreAdafactorConfig
from ..core.rules.adafactor import Adafactor
from .lorapre import AdamOptimizer


class LoRAPreAdafactor(AdamOptimizer):
    """:class:`lorapre_dist.LoRAPre` with row and column statistics for its second moment, AdamW for the rest.

    The arguments are those of :class:`lorapre_dist.optimizers.base.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreAdafactorConfig`.
    """

    config_class = LoRAPreAdafactorConfig
    adam = Adafactor
