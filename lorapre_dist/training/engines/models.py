"""Causal language models from a preset or of Hugging Face's, with the same first weights under every backend."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lorapre_dist.config import ConfigError
from lorapre_dist.config.ds_training import precision, sixteen_bit_weights
from lorapre_dist.layouts.base import local
from lorapre_dist.layouts.dtensor import spread
from lorapre_dist.training.engines import experts, pipeline, pretrained
from lorapre_dist.training.engines.presets import PRESETS
from lorapre_dist.training.run import ranks
from lorapre_dist.training.run.interruption import lost_rank
from lorapre_dist.training.run.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def preset_config(name: str, seq_len: int = 256, vocab_size: int | None = None) -> LlamaConfig | MixtralConfig:
    """A Hugging Face config with the shapes of the preset ``name``."""
    preset = PRESETS[name]
    kind, more = (MixtralConfig, {"num_local_experts": preset.experts}) if preset.experts else (LlamaConfig, {})
    return kind(
        **more,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_key_value_heads or preset.num_attention_heads,
        num_hidden_layers=preset.num_hidden_layers,
        max_position_embeddings=max(preset.max_position_embeddings, seq_len),
        vocab_size=vocab_size or preset.vocab_size,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        use_cache=False,
    )


def model_config(settings: Settings) -> PretrainedConfig:
    """The config that ``--model``, ``--model_config`` or ``--init_from`` asks for, with its own vocabulary size.

    Raises:
        ConfigError: it cannot be read, is of no causal LM, or has fewer positions than ``--seq_len``.
    """
    if settings.preset:
        return preset_config(settings.model_name, settings.seq_len)
    config = pretrained.causal_config(settings.model_name, settings.model_option, weights=bool(settings.init_from))
    named = f"{settings.model_option} {settings.model_name}"
    pretrained.check_positions(config, settings.seq_len, named, "lower --seq_len")
    return config


def fit_vocabulary(config: PretrainedConfig, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a preset's vocabulary to the tokenizer's; another model's must hold it already.

    Raises:
        ConfigError: it does not, or its weights know other token ids.
    """
    if settings.preset:
        config.vocab_size = len(tokenizer)
        return
    pretrained.check_vocabulary(config, len(tokenizer), f"{settings.model_option} {settings.model_name}")
    if settings.init_from and settings.tokenizer != settings.init_from:
        pretrained.check_token_ids(settings.init_from, "--init_from", tokenizer)


def build_model(config: PretrainedConfig, settings: Settings) -> PreTrainedModel:
    """Construct the model, partitioned from birth under ZeRO-3 and FSDP2, and initialise or load it.

    For DeepSpeed it is in the JSON's precision, otherwise in fp32 (bf16 where the optimizer steps such weights) and on
    this rank's device. Initial weights depend on
    the seed and each module's name only: not on the backend, the stage, the number of ranks, or (up to rounding) the
    precision.

    Raises:
        ConfigError: transformers cannot build a causal LM from this config, or ``--init_from`` cannot be loaded.
    """
    kind, option = precision(settings.ds_config), "--init_from"
    as_computed = settings.backend == "deepspeed" or sixteen_bit_weights(settings.ds_config)
    dtype = DTYPES[kind] if as_computed else torch.float32
    if settings.init_from and settings.backend != "fsdp2":
        zero3 = settings.ds_config if settings.zero_stage == 3 else None
        model = pretrained.load(config, settings.init_from, option, dtype, zero3)
    else:
        model = _without_weights(config, settings, dtype)
    if settings.pipeline > 1:
        pipeline.check(model, settings.pipeline, settings.tensor)
        _give_storage(model, pipeline.own_parameters(model, settings.pipeline))
    if settings.backend == "fsdp2":
        _shard(model, kind, settings.expert)
        if settings.init_from:
            with ranks.together():
                pretrained.fill_shards(model, settings.init_from, option, ranks.device(), dtype)
    if settings.backend != "deepspeed":
        device = ranks.device()
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if not settings.init_from:
        initialise(model, settings.seed)
    model.tie_weights()
    if settings.gradient_checkpointing:
        # ZeRO-3 frees a recomputed parameter's storage between forward and backward, which the non-reentrant form
        # takes for changed metadata.
        reentrant = settings.zero_stage == 3
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def _without_weights(config: PretrainedConfig, settings: Settings, dtype: torch.dtype) -> PreTrainedModel:
    """The model before it has weights: partitioned already under ZeRO-3, without storage under FSDP2 and in stages."""
    born: Any = contextlib.nullcontext()
    if settings.zero_stage == 3:
        born = deepspeed.zero.Init(config_dict_or_path=settings.ds_config)
    elif settings.backend == "fsdp2" or settings.pipeline > 1:
        born = _without_storage()
    with no_init_weights(), born:
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:  # whatever a model's own code raises
            if lost_rank(error) is not None:
                raise
            text = f"cannot build a causal LM from {type(config).__name__}: {pretrained.reason(error)}"
            raise ConfigError(text) from error


@contextlib.contextmanager
def _without_storage() -> Iterator[None]:
    """New parameters are of the meta device, so that no rank ever holds the whole model; buffers are real."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one is registered again, and stays the same
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _give_storage(model: nn.Module, names: set[str]) -> None:
    """Give parameters that have none storage, by name."""
    for prefix, module in model.named_modules():
        for key, p in module.named_parameters(prefix, recurse=False):
            if p.is_meta and key in names:
                module._parameters[key.rpartition(".")[2]] = nn.Parameter(torch.empty_like(p, device="cpu"))


def _shard(model: PreTrainedModel, kind: str, expert: int = 1) -> None:
    """FSDP2 over all ranks: a unit for each block of the model, one for the rest; reductions in fp32.

    Args:
        expert: ranks that the experts of each block are split over.
    """
    policy = MixedPrecisionPolicy(param_dtype=None if kind == "fp32" else DTYPES[kind], reduce_dtype=torch.float32)
    if expert > 1:
        experts.split(model, expert, ranks.device().type, mp_policy=policy)
    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Give every module its model's own initial values from an RNG seeded by (``seed``, module name).

    Modules without storage, those of other stages, have none.
    """
    state = torch.random.get_rng_state()
    done: set[int] = set()
    for name, module, owner in _modules(model, "", model):
        parameters = [p for p in module.parameters(recurse=False) if id(p) not in done and not p.is_meta]
        done.update(id(p) for p in parameters)
        if parameters:
            torch.manual_seed(_module_seed(seed, name))
            _initialise_module(owner, module, parameters, name)
        elif not list(module.parameters(recurse=False)):
            # Buffers such as rotary frequencies; zero.Init made them in half precision.
            for key in module._non_persistent_buffers_set:
                buffer = module._buffers[key]
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[key] = buffer.float()
            owner._init_weights(module)
    torch.random.set_rng_state(state)


def _modules(module: nn.Module, prefix: str, owner: PreTrainedModel) -> list[tuple[str, nn.Module, PreTrainedModel]]:
    """Every module with its name and the nearest pre-trained model above it, whose rules apply to it."""
    if isinstance(module, PreTrainedModel):
        owner = module
    found = [(prefix, module, owner)]
    for name, child in module.named_children():
        found += _modules(child, f"{prefix}.{name}" if prefix else name, owner)
    return found


def _module_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big")


@torch.no_grad()
def _initialise_module(owner: PreTrainedModel, module: nn.Module, parameters: list[nn.Parameter], name: str) -> None:
    """Draw in fp32 on the CPU whatever the precision, device and shards, and round once."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        if partitioned and torch.distributed.get_rank() != 0:
            return
        wanted = {key: p for key, p in module._parameters.items() if any(p is other for other in parameters)}
        for key, p in wanted.items():
            module._parameters[key] = nn.Parameter(torch.full(p.shape, float("nan"), dtype=torch.float32))
        owner._init_weights(module)
        if any(bool(module._parameters[key].isnan().any()) for key in wanted) and hasattr(module, "reset_parameters"):
            module.reset_parameters()
            owner._init_weights(module)
        left = any(bool(module._parameters[key].isnan().any()) for key in wanted)
        for key, p in wanted.items():
            _fill(name, p, module._parameters[key])
            module._parameters[key] = p
    if left:
        raise ConfigError(f"{type(owner).__name__} has no rule to initialise {name} ({type(module).__name__})")


def _fill(name: str, parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Copy ``values`` to a parameter, or to this rank's shard of it."""
    if isinstance(parameter, DTensor):
        values = values[tuple(slice(low, high) for low, high in spread(name, parameter).own)]
    local(parameter.data).copy_(values)


class BufferKeeper:
    """Keeps fp32 buffers (rotary frequencies) in fp32: DeepSpeed casts whole modules to bf16 or fp16."""

    def __init__(self, model: nn.Module) -> None:
        self.saved = {
            name: buffer.detach().clone() for name, buffer in model.named_buffers() if buffer.dtype == torch.float32
        }

    def restore(self, model: nn.Module) -> None:
        """Put the kept values back, on the device where each buffer is now."""
        for name, value in self.saved.items():
            owner_name, _, leaf = name.rpartition(".")
            owner: Any = model.get_submodule(owner_name)
            owner._buffers[leaf] = value.to(owner._buffers[leaf].device)


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"), no_init_weights():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return made


def whole(module: Any) -> Any:
    """The model of which an engine's module is a stage or a part of each matrix; the module where it is all of it."""
    return getattr(module, "whole", (module,))[0]


def architecture(model: PreTrainedModel) -> str:
    """Name of the model's class, of which FSDP2 makes one of its own."""
    return next(kind.__name__ for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def count_parameters(model: nn.Module, trained: bool = False) -> int:
    """Number of parameter elements (with ``trained`` of those that are not frozen), whole sizes under ZeRO-3 too."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)
