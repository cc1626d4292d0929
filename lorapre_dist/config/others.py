"""The 2-D parameters that are no projections: embedding, head, routers, what is smaller than the rank.

    other_state="adamw"       two numbers an element, as vectors have
    other_state="adamw8bit"   the same in 8 bits each, with two scales a row (``core/codes.py``)
    other_state="adafactor"   the means of g^2 over rows and columns (arXiv 1804.04235), p + q numbers; no first moment
    embeddings="low_rank"     embedding and head as LoRAPre has matrices, with the same rank

The last three are matrices to the core, with factors of rank 0 but in the last case. Either way they are stepped as
AdamW would step them: at its lr, betas, eps and weight decay, whatever the optimizer of the projections is, and without
GaLore's ``scale``. Vectors keep AdamW's state: they are few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import param_groups
from .options import LoRAPreAdafactorConfig, LoRAPreConfig, LowRankConfig


@dataclass(frozen=True)
class AdamW8bitConfig(LowRankConfig):
    """Settings of AdamW with moments in 8 bits, for what is no projection: no optimizer by itself.

    Attributes:
        betas, eps: as in ``torch.optim.AdamW``.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    optimizer = "AdamW8bit"

    @property
    def vectors(self) -> tuple[str, ...]:
        """Scales of the rows' moments, with which there are codes."""
        return ("exp_avg_row", "exp_avg_sq_row")


Settings = LoRAPreConfig | LoRAPreAdafactorConfig | AdamW8bitConfig


def settings(
    name: str, shape: Sequence[int], config: LowRankConfig, kinds: Mapping[str, str], **adamw: Any
) -> Settings | None:
    """How the state of a parameter is kept that is no projection; None: as AdamW's.

    Args:
        config: of its group.
        kinds: what the types of layers say, see :func:`lorapre_dist.config.param_groups.layer_kinds`.
        adamw: ``lr``, ``betas``, ``eps`` and ``weight_decay``, where it is stepped.
    """
    if len(shape) != 2 or min(shape) < 2:
        return None
    low_rank = config.embeddings == "low_rank" and 0 < config.rank < min(shape) and _is_table(name, kinds)
    same = {**adamw, "seed": config.seed, "init_std": config.init_std}
    if low_rank:
        return LoRAPreConfig(rank=config.rank, state_dtype=config.state_dtype, scale=1.0, **same)
    if config.other_state == "adafactor":
        same["betas"] = 0.0, adamw.get("betas", (0.9, 0.999))[1]
        return LoRAPreAdafactorConfig(rank=0, residual=0.0, scale=1.0, **same)
    if config.other_state == "adamw8bit":
        return AdamW8bitConfig(rank=0, **same)
    return None


def _is_table(name: str, kinds: Mapping[str, str]) -> bool:
    name = param_groups.parameter_name(name)
    return kinds.get(name) in ("embedding", "head") or (name not in kinds and param_groups.is_table_or_head(name))
