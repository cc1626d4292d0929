"""Shapes of a model's parameters, from a preset or a Hugging Face config; the model itself is never there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError
from lorapre_dist.training.presets import PRESETS

from .request import Parameter

LLAMA_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def load(model: str) -> tuple[Parameter, ...]:
    """The trainable parameters of a preset, a model folder or a ``config.json``, tied ones once.

    Raises:
        ConfigError: there is no such model, or transformers cannot build a causal LM from its config.
    """
    if model in PRESETS:
        return llama(asdict(PRESETS[model]))
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(
            f"--model {model}: no such folder or file; give one that holds a Hugging Face config.json, or a preset: "
            + ", ".join(PRESETS)
        )
    if not file.is_file():
        raise ConfigError(f"--model {model}: the folder holds no config.json")
    values = _json(file)
    if values.get("model_type") == "llama" and _has_sizes(values):  # transformers takes seconds to import
        return llama(values)
    from lorapre_dist.training.models import file_config

    try:
        return parameters(file_config(str(file), 1))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model_config", "--model", 1)) from error


def _json(file: Path) -> dict[str, Any]:
    """The object in a file, or nothing: then transformers says what is wrong with it."""
    try:
        values = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _has_sizes(values: Mapping[str, Any]) -> bool:
    """The sizes that ``llama`` needs are all there and possible, and those it may have are, too."""
    sizes = [values.get(name) for name in LLAMA_SIZES]
    sizes += [values.get(name) or 1 for name in ("num_key_value_heads", "head_dim")]
    flags = [values.get(name, False) for name in ("attention_bias", "mlp_bias", "tie_word_embeddings")]
    possible = all(type(size) is int and size > 0 for size in sizes) and all(type(flag) is bool for flag in flags)
    return possible and values["hidden_size"] % values["num_attention_heads"] == 0


def llama(config: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Names and shapes of the parameters of ``LlamaForCausalLM``, in its order.

    ``config`` has the sizes named in ``LLAMA_SIZES``; ``num_key_value_heads``, ``head_dim``, ``attention_bias``,
    ``mlp_bias`` and ``tie_word_embeddings`` have Hugging Face's defaults.
    """
    h, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or h // heads
    q, kv = heads * head, (config.get("num_key_value_heads") or heads) * head
    projections = {
        "self_attn": ({"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}, config.get("attention_bias", False)),
        "mlp": ({"gate": (inner, h), "up": (inner, h), "down": (h, inner)}, config.get("mlp_bias", False)),
    }
    layer: list[tuple[str, tuple[int, ...]]] = []
    for part, (shapes, bias) in projections.items():
        for name, shape in shapes.items():
            layer.append((f"{part}.{name}_proj.weight", shape))
            layer += [(f"{part}.{name}_proj.bias", shape[:1])] * bias
    layer += [("input_layernorm.weight", (h,)), ("post_attention_layernorm.weight", (h,))]
    whole: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (config["vocab_size"], h))]
    for k in range(config["num_hidden_layers"]):
        whole += [(f"model.layers.{k}.{name}", shape) for name, shape in layer]
    whole.append(("model.norm.weight", (h,)))
    if not config.get("tie_word_embeddings", False):
        whole.append(("lm_head.weight", (config["vocab_size"], h)))
    return tuple(Parameter(name, shape) for name, shape in whole)


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
