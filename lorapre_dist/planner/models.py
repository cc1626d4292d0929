"""Shapes of a model's parameters, from a preset or a Hugging Face config; the model itself is never there."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError, extras
from lorapre_dist.training.engines.presets import PRESETS

from .request import Parameter

LLAMA = "LlamaForCausalLM"
#: Sizes to plan for that are no presets of the training program: Llama 3's smaller one, and one of Llama 2's.
LARGE: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
}
NAMES = (*PRESETS, *LARGE)
# What models are trained for, as transformers sorts them; the first that a model type has is taken.
TASKS = (
    *("CAUSAL_LM", "PRETRAINING", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    *("TEXT_TO_WAVEFORM", "MASKED_LM", ""),
)
LLAMA_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


def load(model: str) -> tuple[Parameter, ...]:
    """The trainable parameters of :func:`find`."""
    return find(model)[1]


def find(model: str) -> tuple[str, tuple[Parameter, ...]]:
    """Class and trainable parameters (tied ones once) of a preset, a model folder, a ``config.json`` or a hub name.

    Raises:
        ConfigError: there is no such model, or transformers cannot build one from its config.
    """
    if model in PRESETS and PRESETS[model].experts:
        from lorapre_dist.training.engines.models import preset_config

        return _built(preset_config(model))
    if model in NAMES:
        return LLAMA, llama(LARGE[model] if model in LARGE else asdict(PRESETS[model]))
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        _check_hub_name(model, path)
    values = _json(file)
    if values.get("model_type") == "llama" and _has_sizes(values) and values.get("architectures") in (None, [LLAMA]):
        return LLAMA, llama(values)  # transformers takes seconds to import
    extras.need("train", "transformers", why=f"--model {model}")
    from lorapre_dist.training.engines.pretrained import read_config

    config = read_config(str(file) if path.exists() else model, "--model")
    try:
        return _built(config)
    except ConfigError as error:
        raise ConfigError(f"--model {model}: {error}") from error


def _check_hub_name(model: str, path: Path) -> None:
    """Raise a ConfigError if ``model``, which is no file, means a local one or a preset."""
    from lorapre_dist.training.run.settings import looks_like_path

    if path.is_dir():
        raise ConfigError(f"--model {model}: the folder holds no config.json")
    near = [] if "/" in model else difflib.get_close_matches(model, NAMES, n=1, cutoff=0.6)
    if near or looks_like_path(model):
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--model {model}: no such folder or file{hint}; give a folder with a Hugging Face config.json, a hub name "
            f"or a preset: {', '.join(NAMES)}"
        )


def _json(file: Path) -> dict[str, Any]:
    """The object in a file, or nothing: then transformers says what is wrong with it."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, OSError):
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
    """Names and shapes of the model that ``config`` describes."""
    return _built(config)[1]


def _built(config: Any) -> tuple[str, tuple[Parameter, ...]]:
    """Class, names and shapes of the model that ``config`` describes, built on the meta device.

    Raises:
        ConfigError: transformers has none, or its code raises.
    """
    import torch
    from transformers.initialization import no_init_weights

    from lorapre_dist.training.engines.pretrained import reason

    kind = _class_of(config)
    try:
        with torch.device("meta"), no_init_weights():
            model = kind(config)
        model.tie_weights()
    except Exception as error:  # whatever a model's own code raises
        raise ConfigError(f"transformers cannot build {kind.__name__} from this config: {reason(error)}") from error
    return kind.__name__, tuple(Parameter(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad)


def _class_of(config: Any) -> Any:
    """The class that the config names, else the one that the model type is trained as; all of it, not a part.

    Raises:
        ConfigError: transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and getattr(named, "config_class", None) is type(config):
            return named
    for task in TASKS:
        found = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING").get(type(config), None)
        kind = found[0] if isinstance(found, tuple) else found
        # Of an encoder-decoder or a composite model the causal LM is its decoder, or its language model, alone.
        part = (task == "CAUSAL_LM" and config.is_encoder_decoder) or (
            kind is not None and kind.config_class in config.sub_configs.values()
        )
        if kind is not None and not part:
            return kind
    raise ConfigError(f"transformers has no model of type {config.model_type}")
