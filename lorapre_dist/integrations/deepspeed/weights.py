"""The option ``weights`` under DeepSpeed: bf16 weights that the optimizer steps without an fp32 copy.

DeepSpeed keeps fp32 masters unless ``bf16.bf16_master_weights_and_grads`` is set; then ZeRO hands the optimizer bf16
weights and gradients. Its own optimizers can do so on the CPU alone, or with ``bf16.bf16_optimizer_states``, which is
for the type of their state; ours takes it as leave to stay on the accelerator, and has ``state_dtype`` for that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from ...config import ConfigError, ds_json
from ...config.options import SIXTEEN
from ...optimizers import LowRankOptimizer

_SWITCH = "bf16_master_weights_and_grads"


def check(config: Mapping[str, Any], wanted: Iterable[str | None]) -> None:
    """Raise a ConfigError unless the JSON hands the optimizer weights of the type that its groups' ``weights`` is for.

    Args:
        wanted: the option of each parameter group.
    """
    sixteen = [weights for weights in wanted if weights in SIXTEEN]
    others = [weights for weights in wanted if weights not in SIXTEEN]
    section = config.get("bf16") or config.get("bfloat16") or {}
    switched = bool(section.get(_SWITCH))
    if switched and others:
        raise ConfigError(
            f"bf16.{_SWITCH}=True: bf16 weights would lose small updates in rounding; set weights='stochastic' or "
            "'kahan' in optimizer.params, or leave it out"
        )
    if not sixteen:
        return
    named, stage = f"weights={sixteen[0]!r}", ds_json.zero_stage(config)
    if ds_json.precision(config) != "bf16":
        raise ConfigError(f"{named}: is for bf16 weights; set bf16.enabled, and bf16.{_SWITCH}, to true")
    if stage == 0:
        raise ConfigError(f"{named}: ZeRO stage 0 keeps fp32 masters; take stage 1, 2 or 3, or PyTorch's DDP")
    if not switched:
        raise ConfigError(f"{named}: DeepSpeed would keep fp32 masters; set bf16.{_SWITCH} to true")
    if (config.get("data_types") or {}).get("grad_accum_dtype") == "fp32" and stage == 1:
        raise ConfigError(
            f"{named}: with data_types.grad_accum_dtype='fp32' ZeRO stage 1 keeps fp32 masters; leave it out, or take "
            "stage 2"
        )


def allow(zero_optimizer: Any) -> None:
    """Let ZeRO (the class) give our optimizers bf16 weights, on an accelerator or offloaded, as its own; idempotent."""
    configure = zero_optimizer._configure_master_weights
    if hasattr(configure, "__wrapped__"):
        return

    @functools.wraps(configure)
    def configured(zero: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(zero.optimizer, LowRankOptimizer):
            kwargs["bf16_offload_validator"] = None  # it asks for DeepSpeedCPUAdam, by name
        return configure(zero, *args, **kwargs)

    zero_optimizer._configure_master_weights = configured
