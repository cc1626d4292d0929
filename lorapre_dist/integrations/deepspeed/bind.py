"""DeepSpeed: register our optimizers for the JSON's ``optimizer.type``, refuse what they cannot do, bind the layout.

DeepSpeed resolves an unknown optimizer name with ``getattr(torch.optim, name)`` and hands it bare parameters. Names
and layout are known to the engine alone, so ``DeepSpeedEngine._configure_optimizer`` is wrapped: once DeepSpeed has
built its own optimizer around ours, ours is told which piece of which parameter lies where. Both ``initialize`` doors
pass through there.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...config import extras

extras.need("deepspeed")

import deepspeed as ds
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero import utils as zero_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

from ...config import ConfigError, LowRankConfig, ds_json, shipped
from ...config.checks import shown
from ...config.param_groups import shape_of
from ...core.comm import all_ranks
from ...layouts import whole, zero3, zero12
from ...layouts.base import Layout
from ...optimizers import OPTIMIZERS, LowRankOptimizer, agreement
from ...optimizers.awaiting import building_under_engine
from . import checkpoint as checkpoints
from . import fixes, keys, names, ranks, splits, weights


def _above(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and value > limit


# Where in the JSON, when it is refused, and why.
_UNSUPPORTED: tuple[tuple[str, Any, str], ...] = (
    ("zero_optimization.offload_optimizer.device", "nvme", "its swapper moves AdamW's tensors only; use 'cpu'"),
    ("zero_optimization.offload_optimizer.super_offload", True, "it brings its own Adam; use plain 'cpu' offload"),
    ("zero_optimization.offload_optimizer.ratio", lambda v: v != 1.0, "it brings a second Adam; leave it at 1.0"),
    ("zero_optimization.zenflow", lambda v: v is not None, "it replaces the optimizer's step"),
    ("zero_optimization.elastic_checkpoint", True, "it cuts state tensors to the length of the flat weights"),
    ("zero_optimization.mics_shard_size", _above(0), "DeepSpeed has it no more; take FSDP2 over a 2-D mesh (HSDP)"),
    ("fp16.fp16_master_weights_and_grads", True, "take bf16, bf16_master_weights_and_grads and weights='stochastic'"),
    ("torch_autocast.enabled", True, "its gradient scaler steps the optimizer behind DeepSpeed; use bf16 or fp16"),
    ("sparse_gradients", True, "LoRAPre needs dense gradients"),
    ("checkpoint.load_universal", True, "universal checkpoints carry AdamW's state only"),
)

# Where in the JSON, what all ranks must have alike; what names folders and hosts may differ.
_AGREED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization.stage", "zero_optimization.sub_group_size", "zero_optimization.offload_optimizer.device"),
    *("zero_optimization.round_robin_gradients", "bf16", "fp16", "scheduler", "prescale_gradients"),
)


def register() -> None:
    """Make the values of ``"type"`` known to DeepSpeed and to ZeRO; idempotent. See :mod:`.register` for when."""
    for name, cls in OPTIMIZERS.items():
        setattr(torch.optim, name, cls)
        if cls not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(cls)
    if not hasattr(DeepSpeedEngine._configure_optimizer, "__wrapped__"):
        DeepSpeedEngine._configure_distributed_model = _agreeing(DeepSpeedEngine._configure_distributed_model)
        DeepSpeedEngine._configure_optimizer = _binding(DeepSpeedEngine._configure_optimizer)
        weights.allow(ZeROOptimizer)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``: same arguments and result, after checking the configuration.

    The name of a shipped configuration stands for its file.

    Raises:
        ConfigError: an unknown or bad key or option, an unsupported DeepSpeed feature, or nothing is low-rank.
    """
    call = inspect.signature(ds.initialize).bind_partial(*args, **kwargs)
    given = call.arguments
    options: Any = copy.copy(given.get("args"))
    config: Any = given.get("config") or given.get("config_params") or getattr(options, "deepspeed_config", None)
    if config is not None:
        check_config(config)
    if isinstance(config, (str, Path)):
        path = shipped.located(config)
        for name in ("config", "config_params"):
            if given.get(name) is config:
                given[name] = path
        if getattr(options, "deepspeed_config", None) is config:
            options.deepspeed_config, given["args"] = path, options
    return ds.initialize(*call.args, **call.kwargs)


def check_config(config: Mapping[str, Any] | str | Path) -> LowRankConfig | None:
    """Check a DeepSpeed configuration before anything is built from it.

    Args:
        config: the mapping, the path of a file, or text in base64: what DeepSpeed takes.

    Returns:
        The optimizer's settings, or None if the configuration names another optimizer, or none.

    Raises:
        ConfigError: an unreadable file, a key or value that DeepSpeed ignores or refuses, an unknown or bad optimizer
            option, a DeepSpeed feature that our optimizers do not support.
    """
    if not isinstance(config, Mapping):
        with ds_json.naming(f"DeepSpeed configuration {str(config)!r}"):
            return check_config(ds_json.read(config))
    ds_json.check_values(config)
    optimizer = config.get("optimizer") or {}
    kind = optimizer.get("type", "")
    if kind not in OPTIMIZERS and _meant(kind):
        raise ConfigError(f"optimizer.type={kind!r}: did you mean {_meant(kind)!r}?")
    if kind in OPTIMIZERS:
        _check_features(config, kind)
    keys.check(config)
    if kind not in OPTIMIZERS:
        return None
    settings = OPTIMIZERS[kind].config_class.from_params(optimizer.get("params") or {})
    weights.check(config, [settings.weights])
    return settings


def _meant(kind: Any) -> str | None:
    """The name of one of our optimizers that differs in case and dashes alone."""
    plain = str(kind).lower().replace("-", "").replace("_", "")
    return next((name for name in OPTIMIZERS if name.lower() == plain), None)


def _check_features(config: Mapping[str, Any], kind: str) -> None:
    for path, refused, why in _UNSUPPORTED:
        value = _lookup(config, path)
        if value is not None and (refused(value) if callable(refused) else value == refused):
            raise ConfigError(f"{path}={value!r} is not supported with {kind}: {why}")


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer inside DeepSpeed's own: one of ours, or whatever the configuration named."""
    return engine.basic_optimizer


def engine_layout(engine: Any) -> Layout:
    """Where the parameters of a DeepSpeed engine lie.

    Raises:
        ConfigError: DeepSpeed wrapped the optimizer in a way that is not understood.
    """
    called = names.of_parameters(engine)
    made = _layout(engine.optimizer, engine.basic_optimizer, called)
    made.beyond = ranks.beyond(engine)
    splits.join(engine, made, splits.of_engine(engine))
    replicas = {name for p, name in called.items() if getattr(p, "ds_pipe_replicated", False)}
    for unit in made.units if replicas else ():
        unit.pieces = [replace(p, replica=p.replica or p.name in replicas) for p in unit.pieces]
    return made


def _layout(wrapper: Any, optimizer: torch.optim.Optimizer, named: dict[torch.nn.Parameter, str]) -> Layout:
    if wrapper is optimizer:
        groups = [[p for p in g["params"] if p.requires_grad] for g in wrapper.param_groups]
        return whole.layout([(named[p], p, i) for i, group in enumerate(groups) for p in group], "ZeRO-0")
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return zero3.layout(wrapper, named)
    if isinstance(wrapper, DeepSpeedZeroOptimizer):
        return zero12.layout(wrapper, named)
    if isinstance(wrapper, BF16_Optimizer):
        return zero12.bf16_layout(wrapper, named)
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        pairs = [
            zip(low, high, strict=True) for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        ]
        masters = [(named[low], high, i) for i, group in enumerate(pairs) for low, high in group]
        return whole.layout(masters, "ZeRO-0 (fp32 master)")
    raise ConfigError(f"LoRAPre does not know DeepSpeed's {type(wrapper).__name__}; use ZeRO stage 0, 1, 2 or 3")


def _agreeing(configure: Any) -> Any:
    """``DeepSpeedEngine._configure_distributed_model``, which sends weights around, where the ranks agree on them."""

    @functools.wraps(configure)
    def agree_and_configure(engine: Any, model: Any) -> Any:
        if engine.optimizer_name() in OPTIMIZERS:
            agreement.require(_engine_facts(engine))
            called = names.naming(model)
            parameters = [(called(name), p, None) for name, p in model.named_parameters()]
            agreement.require(agreement.of_parameters(parameters), shares=ranks.sharing(engine))
        return configure(engine, model)

    return agree_and_configure


def _engine_facts(engine: Any) -> agreement.Facts:
    """What has to be the same on all ranks of an engine beside the model: settings that change the step."""
    facts = agreement.of_program(engine.optimizer_name())
    facts["the version of deepspeed"] = ds.__version__
    given = engine._config._param_dict
    facts |= {path: shown(_lookup(given, path)) for path in _AGREED}
    facts["optimizer.params"] = shown(sorted((engine.optimizer_params() or {}).items()))
    if isinstance(engine.client_optimizer, LowRankOptimizer):
        facts |= agreement.of_settings(engine.client_optimizer)
    return facts


def _group_facts(engine: Any, optimizer: LowRankOptimizer | None, given: list[Any]) -> agreement.Facts:
    """The parameter groups of an optimizer that was handed over, or of ``model_parameters``."""
    groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    groups = groups if optimizer is None else optimizer.param_groups
    facts = {"the number of parameter groups": str(len(groups))}
    options = OPTIMIZERS[engine.optimizer_name()]._options()
    for i, group in enumerate(groups):
        facts |= {f"{key} of parameter group {i}": shown(group[key]) for key in sorted(options & group.keys())}
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        facts[f"the parameters of group {i}"] = str([engine.param_names.get(p) for p in tensors])
    return facts


def _binding(configure: Any) -> Any:
    """``DeepSpeedEngine._configure_optimizer`` that binds our optimizer to the engine's layout."""

    @functools.wraps(configure)
    def configure_and_bind(engine: Any, client_optimizer: Any, model_parameters: Any) -> Any:
        config = engine._config._param_dict
        if isinstance(client_optimizer, LowRankOptimizer):
            ds_json.check_values(config)
            _check_features(config, client_optimizer.config.optimizer)
            keys.check(config)
            weights.check(config, [group["weights"] for group in client_optimizer.param_groups])
            client_optimizer.awaiting_layout = True
        elif client_optimizer is None and _meant((config.get("optimizer") or {}).get("type")):
            check_config(config)
        if engine.optimizer_name() in OPTIMIZERS:
            agreement.require(_group_facts(engine, client_optimizer, model_parameters), shares=ranks.sharing(engine))
        if engine.optimizer_name() in OPTIMIZERS or isinstance(client_optimizer, LowRankOptimizer):
            _check_sequences(engine)
        with building_under_engine():
            result = configure(engine, client_optimizer, model_parameters)
        optimizer = engine.basic_optimizer
        if isinstance(optimizer, LowRankOptimizer):
            trainable = {p: name for p, name in names.of_parameters(engine).items() if p.requires_grad}
            if engine.optimizer_name() not in OPTIMIZERS:  # the caller's function has built it
                agreement.require(agreement.of_settings(optimizer))
            names.check_tied(engine.module)
            optimizer.learn_types(engine.module, names.naming(engine.module))
            _check_matches(engine, optimizer, trainable)
            optimizer.bind(engine_layout(engine))
            _mend(engine, trainable)
            checkpoints.install(engine)
        return result

    return configure_and_bind


def _check_sequences(engine: Any) -> None:
    """Refuse what DeepSpeed does without a word with a mesh of its own: it adds gradients up over data ranks alone."""
    if engine.sequence_parallel_size > 1 and engine.mpu is None and engine.zero_optimization_stage() < 3:
        raise ConfigError(
            f"sequence_parallel_size={engine.sequence_parallel_size} in the JSON with ZeRO stage "
            f"{engine.zero_optimization_stage()}: DeepSpeed does not add up the gradients of a sequence's parts there; "
            "give mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp to initialize, or take stage 3"
        )


def _check_matches(engine: Any, optimizer: LowRankOptimizer, names: dict[Any, str]) -> None:
    """One of the parameters must be low-rank, of those of all stages of a pipeline."""
    split = splits.of_engine(engine)
    shapes = {name: split[name].shape if name in split else shape_of(p) for p, name in names.items()}
    if ranks.sharing(engine) is not None:
        kinds = optimizer._other_layers
        for theirs, their_kinds in all_ranks((shapes, kinds)):
            shapes, kinds = shapes | theirs, kinds | their_kinds
        optimizer._other_layers = kinds
    optimizer.check_matches(list(shapes.items()))


def _mend(engine: Any, names: dict[Any, str]) -> None:
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if wrapper is optimizer and optimizer.layout.beyond:
        if len(ranks.of_experts(engine)) > 1 and engine.gradient_clipping():
            raise ConfigError(
                "gradient_clipping with experts of several ep_size is not supported under ZeRO stage 0: use stage 1"
            )
        fixes.clip_by_all_stages(engine, optimizer.layout.beyond, functools.partial(_counts, engine))
    if wrapper is not optimizer:
        optimizer.layout.checks_gradients = True
        searching = engine.fp16_enabled() and bool(engine.dynamic_loss_scale())
        fixes.skip_non_finite(wrapper, optimizer, names, searching)
    if isinstance(wrapper, (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)):
        fixes.forget_gradients(wrapper)
    if isinstance(wrapper, FP16_UnfusedOptimizer) and engine.fp16_enabled():
        fixes.scale_loss(engine)
    if engine.fp16_enabled() and engine.dynamic_loss_scale():
        fixes.grow_loss_scale_after_step(wrapper)


def _counts(engine: Any, parameter: Any) -> bool:
    """Whether a parameter's gradient counts on this rank in a norm over all model- and expert-parallel ranks."""
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    experts = ranks.of_experts(engine)
    if not is_moe_param(parameter) and any(dist.get_rank(group) for group in experts):
        return False
    return is_model_parallel_parameter(parameter) or bwc_tensor_model_parallel_rank(engine.mpu) == 0


def _lookup(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value
