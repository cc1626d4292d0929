"""Hugging Face models by folder, ``config.json`` or hub name: their configuration, and their weights."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.reading import first_line
from lorapre_dist.training.run.interruption import lost_rank
from lorapre_dist.training.run.ranks import saying

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
LONGEST_REASON = 300


def reason(error: BaseException) -> str:
    """What a library says of ``error``, in one line that can be read; some of them list all that they know."""
    text = first_line(error)
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


def read_config(name: str, option: str) -> PretrainedConfig:
    """The configuration of a model folder, a JSON file or a hub model; no code of theirs is run.

    Args:
        option: what to call it in an error.

    Raises:
        ConfigError: not there, or of no model type that transformers knows.
    """
    from huggingface_hub.utils.logging import set_verbosity_error as quiet_hub

    quiet_hub()  # errors are reported here, once
    set_verbosity_error()
    try:
        with saying(f"for the hub: config of {name}"):
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        what = (
            "not a usable model config"
            if Path(name).exists()
            else "cannot be loaded: no such folder, and as a hub name"
        )
        raise ConfigError(f"{option} {name}: {what}: {reason(error)}") from error


def causal_config(name: str, option: str, weights: bool) -> PretrainedConfig:
    """As :func:`read_config`, of a model that predicts the next token.

    Args:
        weights: its weights will be read too, not its shapes alone.

    Raises:
        ConfigError: also where transformers has no causal LM of the model type, or only the decoder of a larger model,
            and for quantised weights.
    """
    config = read_config(name, option)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "an encoder-decoder" if config.is_encoder_decoder else "no causal LM"
        raise ConfigError(
            f"{option} {name}: {config.model_type} is {what} in transformers; a model that predicts the next token is "
            "needed, such as llama, qwen3 or gpt2"
        )
    if getattr(config, "quantization_config", None) is not None:
        if weights:
            raise ConfigError(f"{option} {name}: its weights are quantised; training needs them as they were before")
        del config.quantization_config
    config.use_cache = False
    return config


def check_positions(config: PretrainedConfig, tokens: int, named: str, cure: str) -> None:
    """Raise a ConfigError if sequences of so many ``tokens`` are longer than the model's; ``cure`` says what to do."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"{named}: its max_position_embeddings {limit} is less than the {tokens} tokens that may be needed; {cure}"
        )


def check_vocabulary(config: PretrainedConfig, tokens: int, named: str) -> None:
    """Raise a ConfigError if the model has fewer embeddings than the tokenizer has ``tokens``."""
    size = config.get_text_config().vocab_size
    if size < tokens:
        raise ConfigError(f"{named}: its vocab_size {size} is less than the tokenizer's {tokens} tokens")


def check_token_ids(name: str, option: str, tokenizer: Any) -> None:
    """Weights know the token ids that they were trained with: refuse a ``tokenizer`` that has others.

    Tokens that it has beyond those of the model's own are allowed; so is any tokenizer where the model has none.

    Raises:
        ConfigError: an id is that of another token.
    """
    try:
        own = {number: token for token, number in AutoTokenizer.from_pretrained(name).get_vocab().items()}
    except Exception:  # no tokenizer there
        return
    vocabulary = tokenizer.get_vocab()
    other = sum(own.get(number, token) != token for token, number in vocabulary.items())
    if other:
        raise ConfigError(
            f"{option} {name}: {other:,} of the {len(vocabulary):,} tokens of the tokenizer in use have other ids than "
            "in the model's own, whose ids its weights know; leave --tokenizer out, or tokenise with the model's"
        )


def load(config: PretrainedConfig, name: str, option: str, dtype: torch.dtype, zero3: Any = None) -> PreTrainedModel:
    """The causal LM with its weights, on the CPU; partitioned while it is loaded under ZeRO-3, a collective there.

    Args:
        dtype: of the parameters.
        zero3: the DeepSpeed JSON under ZeRO-3. Rank 0 alone then reads the files, mapped into memory, and broadcasts a
            module at a time: no rank holds the whole model.

    Raises:
        ConfigError: the weights cannot be loaded, or some are missing.
    """
    disable_progress_bar()
    set_verbosity_error()  # what it would report is checked here
    alive = None
    if zero3 is not None:
        from transformers.integrations import HfDeepSpeedConfig

        alive = HfDeepSpeedConfig(copy.deepcopy(zero3))  # while this lives, from_pretrained builds under zero.Init
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds
        if lost_rank(error) is not None:
            raise
        raise ConfigError(f"{option} {name}: cannot be loaded: {reason(error)}") from error
    finally:
        del alive
    _check_complete(model, info["missing_keys"], info["mismatched_keys"], f"{option} {name}")
    return model


def fill_shards(
    model: PreTrainedModel, name: str, option: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Give a model of sharded parameters without storage its weights: each rank reads its own rows; no collective.

    Args:
        model: under FSDP2, its parameters DTensors of the meta device, which real ones on ``device`` replace.
        dtype: of those.

    Raises:
        ConfigError: the weights are not there as safetensors, cannot be read, or some are missing.
    """
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    disable_progress_bar()
    files = _safetensors(name, option)
    try:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            slices = {key: file.get_slice(key) for file in opened for key in file.keys()}  # noqa: SIM118  (no mapping)
            how = LoadStateDictConfig(
                dtype=dtype, device_map={"": device}, weight_mapping=get_model_conversion_mapping(model)
            )
            info, _ = convert_and_load_state_dict_in_model(model, slices, how, None)
    except Exception as error:  # safetensors and transformers raise many kinds
        raise ConfigError(f"{option} {name}: cannot be loaded: {reason(error)}") from error
    _check_complete(model, info.missing_keys, info.mismatched_keys, f"{option} {name}")
    model.tie_weights()  # of two names for one parameter the files hold one


def _safetensors(name: str, option: str) -> list[Path]:
    """The weight files of a model folder or hub model.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(name)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
        names = [WEIGHTS]
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except Exception as error:  # of the hub, or of an index that is none
        raise ConfigError(f"{option} {name}: its weights cannot be found: {reason(error)}") from error
    missing = [file for file in names if not (folder / file).is_file()]
    if missing:
        raise ConfigError(
            f"{option} {name}: {missing[0]} is not there; --backend fsdp2 reads safetensors: save the model as such"
        )
    return [folder / file for file in names]


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that share another's storage: a model's files hold them once."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _check_complete(model: PreTrainedModel, missing: Iterable[str], mismatched: Iterable[Any], named: str) -> None:
    """Raise a ConfigError if a parameter got no weights, or some of another shape."""
    left = sorted({*missing, *(m[0] for m in mismatched)} - tied_names(model))
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ConfigError(f"{named}: holds no weights for {', '.join(left[:3])}{more}; name a complete model")
