"""Adam with a low-rank first moment and Adafactor's second."""

from __future__ import annotations

from ..config import LoRAPreAdafactorConfig
from ..core import adafactor
from ..optimizer import LoRAPre, LowRankOptimizer


class LoRAPreAdafactor(LowRankOptimizer):
    """:class:`lorapre_dist.LoRAPre` with row and column statistics for its second moment, AdamW for the rest.

    The arguments are those of :class:`lorapre_dist.optimizer.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreAdafactorConfig`.
    """

    config_class = LoRAPreAdafactorConfig
    core = adafactor

    from_adamw = classmethod(LoRAPre.from_adamw.__func__)  # type: ignore[attr-defined]
    matrix_hyper = staticmethod(LoRAPre.matrix_hyper)
    vector_hyper = staticmethod(LoRAPre.vector_hyper)
