"""A pre-trained causal LM under any ZeRO stage, with or without LoRA adapters; and the trained one as a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from lorapre_dist.checkpoint.team import Team
from lorapre_dist.config import ConfigError
from lorapre_dist.config.ds_training import precision, zero_stage
from lorapre_dist.config.param_groups import matches
from lorapre_dist.training.engines import pretrained
from lorapre_dist.training.engines.models import DTYPES
from lorapre_dist.training.engines.pretrained import tied_names
from lorapre_dist.training.finetune.settings import FinetuneSettings
from lorapre_dist.training.run import ranks


def model_config(settings: FinetuneSettings) -> PretrainedConfig:
    """The config of ``--model``.

    Raises:
        ConfigError: not a model folder or hub name of a causal LM.
    """
    return pretrained.causal_config(settings.model_name, "--model", weights=True)


def check_sizes(config: PretrainedConfig, settings: FinetuneSettings, vocab_size: int, longest: int) -> None:
    """Raise a ConfigError if the model is too small.

    Args:
        vocab_size: of the tokenizer.
        longest: tokens of the longest sequence that training or scoring may see.
    """
    named = f"--model {settings.model}"
    pretrained.check_vocabulary(config, vocab_size, named)
    pretrained.check_positions(config, longest, named, "lower --seq_len or --max_new_tokens")


def load_model(config: PretrainedConfig, settings: FinetuneSettings) -> PreTrainedModel:
    """The model in the JSON's precision, partitioned while it is loaded under ZeRO-3; a collective there.

    Raises:
        ConfigError: the weights cannot be loaded, or some are missing.
    """
    stage, dtype = zero_stage(settings.ds_config), DTYPES[precision(settings.ds_config)]
    zero3 = settings.ds_config if stage == 3 else None
    model = pretrained.load(config, settings.model_name, "--model", dtype, zero3)
    if settings.optimizer == "lora":
        add_adapters(model, settings)
    if settings.gradient_checkpointing:
        # As in pre-training; adapters behind a frozen embedding need its output to require a gradient.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": stage == 3})
        if settings.optimizer == "lora":
            model.enable_input_require_grads()
    model.train()
    return model


def add_adapters(model: PreTrainedModel, settings: FinetuneSettings) -> None:
    """Standard LoRA (peft) on the matrices that LoRAPre would keep low-rank momenta of; everything else is frozen.

    Raises:
        ConfigError: the model has no such matrix.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # Output layers are no projections, whatever they are called.
    skipped = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    found = {
        name: module
        for name, module in model.named_modules()
        if matches(f"{name}.weight") and isinstance(module, (nn.Linear, Conv1D)) and id(module) not in skipped
    }
    if not found:
        raise ConfigError(f"--optimizer lora: {settings.model} has no attention or MLP projection to adapt")
    options = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in found.values())
    state = torch.random.get_rng_state()
    torch.manual_seed(settings.seed)  # every rank draws the same
    inject_adapter_in_model(LoraConfig(target_modules=list(found), bias="none", **options), model)
    torch.random.set_rng_state(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model folder that ``from_pretrained`` loads, adapters merged into the weights; a collective.

    Weights are in the precision that the model computes in. The folder appears when it is complete.

    Raises:
        CheckpointError: it cannot be written.
    """
    weights = {}
    # One at a time on every rank: under ZeRO-3 the rest stays partitioned.
    for name, value in gathered(model):
        if ranks.rank() == 0:
            weights[name] = value.cpu().clone()
    team = Team()
    with team.together(f"saving the model to {folder}"):
        if team.rank == 0:
            partial = folder.with_name(f".{folder.name}.writing")
            shutil.rmtree(partial, ignore_errors=True)
            _write(model, weights, partial)
            tokenizer.save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)


def _write(model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config.use_cache = use_cache


@torch.no_grad()
def gathered(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight whole, under its name in the model without adapters; a collective, each valid for one iteration."""
    tied, done = tied_names(model), set()
    for name, module in model.named_modules():
        adapted = hasattr(module, "get_delta_weight")
        own = [p for p in (module.parameters() if adapted else module.parameters(recurse=False)) if id(p) not in done]
        done.update(id(p) for p in own)
        partitioned = [p for p in own if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            if adapted:
                base: Any = module.get_base_layer()
                for leaf, value in base.named_parameters(recurse=False):
                    delta = module.get_delta_weight("default").to(value.dtype) if leaf == "weight" else 0
                    yield f"{name}.{leaf}", value + delta
            else:
                for leaf, value in module.named_parameters(recurse=False):
                    full = f"{name}.{leaf}" if name else leaf
                    if full not in tied and any(value is p for p in own):
                        yield full, value
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            yield name, buffer
