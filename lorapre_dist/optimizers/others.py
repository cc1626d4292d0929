"""The 2-D parameters that are no projections: embedding, head, routers, what is smaller than the rank.

    other_state="adamw"       two numbers an element, as vectors have
    other_state="adafactor"   the means of g^2 over rows and columns (arXiv 1804.04235), p + q numbers; no first moment
    embeddings="low_rank"     embedding and head as LoRAPre has matrices, with the same rank

The last two are matrices to the core: with factors of rank 0 in the first case. Either way they are stepped as AdamW
would step them: at its lr, betas, eps and weight decay, whatever the optimizer of the projections is, and without
GaLore's ``scale``. Vectors keep AdamW's state: they are few.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..config import LoRAPreAdafactorConfig, LoRAPreConfig, LowRankConfig, param_groups
from ..core.regression import Regression
from ..core.rules.adafactor import Adafactor
from ..core.rules.adam import Adam
from ..core.rules.adamw import Hyper
from ..core.step import Rule

Settings = LoRAPreConfig | LoRAPreAdafactorConfig


def settings(
    name: str, shape: tuple[int, ...], config: LowRankConfig, kinds: Mapping[str, str], hyper: Hyper | None = None
) -> Settings | None:
    """How the state of a parameter is kept that is no projection; None: as AdamW's.

    Args:
        config: of its group.
        kinds: what the types of layers say, see :func:`lorapre_dist.config.param_groups.layer_kinds`.
        hyper: AdamW's settings, where it is stepped.
    """
    if len(shape) != 2 or min(shape) < 2:
        return None
    same = {"seed": config.seed, "init_std": config.init_std}
    if hyper is not None:
        same |= {"lr": hyper.lr, "eps": hyper.eps, "weight_decay": hyper.weight_decay}
    betas = (0.9, 0.999) if hyper is None else hyper.betas
    if config.embeddings == "low_rank" and config.rank and _is_table(name, kinds) and min(shape) > config.rank:
        return LoRAPreConfig(rank=config.rank, betas=betas, scale=1.0, state_dtype=config.state_dtype, **same)
    if config.other_state == "adafactor":
        return LoRAPreAdafactorConfig(rank=0, betas=(0.0, betas[1]), residual=0.0, scale=1.0, **same)
    return None


def _is_table(name: str, kinds: Mapping[str, str]) -> bool:
    name = param_groups.parameter_name(name)
    return kinds.get(name) in ("embedding", "head") or (name not in kinds and param_groups.is_table_or_head(name))


def rule(config: Settings) -> Rule:
    """How such parameters are stepped, from their :func:`settings`."""
    gammas = config.resolved_gammas[: len(config.ranks)]
    kind = Adam if isinstance(config, LoRAPreConfig) else Adafactor
    return kind(
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        scale=config.scale,
        residual=config.resolved_residual,
        max_update=config.resolved_max_update,
        regression=Regression(gammas, config.resolved_damping, stable=True),
    )
