"""Adam with a low-rank first moment and Adafactor's second."""

from __future__ import annotations

from ..config import LoRAPreAdafactorConfig
from ..core.adafactor import Adafactor
from ..core.step import Rule
from ..optimizer import LoRAPre, LowRankOptimizer, adam_rule


class LoRAPreAdafactor(LowRankOptimizer):
    """:class:`lorapre_dist.LoRAPre` with row and column statistics for its second moment, AdamW for the rest.

    The arguments are those of :class:`lorapre_dist.optimizer.LowRankOptimizer` and of
    :class:`lorapre_dist.config.LoRAPreAdafactorConfig`.
    """

    config_class = LoRAPreAdafactorConfig

    from_adamw = classmethod(LoRAPre.from_adamw.__func__)  # type: ignore[attr-defined]

    @staticmethod
    def rule(config: LoRAPreAdafactorConfig) -> Rule:
        """How a group's matrices are stepped, from its settings."""
        return adam_rule(Adafactor, config)

    vector_hyper = staticmethod(LoRAPre.vector_hyper)
