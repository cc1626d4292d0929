"""Shapes of a model's parameters, from a preset or a Hugging Face config; the model itself is never there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError
from lorapre_dist.training.presets import PRESETS, parameter_shapes

from .request import Parameter


def load(model: str) -> tuple[Parameter, ...]:
    """The trainable parameters of a preset, a model folder or a ``config.json``, tied ones once.

    Raises:
        ConfigError: there is no such model, or transformers cannot build a causal LM from its config.
    """
    if model in PRESETS:  # at once, where transformers takes seconds to import
        return tuple(Parameter(name, shape) for name, shape in parameter_shapes(PRESETS[model]))
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(
            f"--model {model}: no such folder or file; give one that holds a Hugging Face config.json, or a preset: "
            + ", ".join(PRESETS)
        )
    if not file.is_file():
        raise ConfigError(f"--model {model}: the folder holds no config.json")
    from lorapre_dist.training.models import file_config

    try:
        return parameters(file_config(str(file), 1))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model_config", "--model", 1)) from error


def parameters(config: Any) -> tuple[Parameter, ...]:
    """Names and shapes of the causal LM that ``config`` describes, built on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except Exception as error:  # whatever a model's own code raises
        raise ConfigError(f"cannot build a causal LM from {type(config).__name__}: {error}") from error
    return tuple(Parameter(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad)
