"""Which parameters are low-rank matrices: matching by name, shape and rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .config import ConfigError, check_expression

# Attention and MLP projections under the names that Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, Falcon,
# BLOOM, BERT, T5 and Meta's own Llama code give them.
DEFAULT_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj"),
    *("gate_up_proj", "fc1", "fc2", "query", "key", "value", "query_key_value", "dense", "dense_h_to_4h"),
    *("dense_4h_to_h", "c_attn", "c_proj", "c_fc", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "wi", "wi_0", "wi_1"),
    *("q", "k", "v", "o", "in_proj_weight", "linear1", "linear2", "self_attn", "attn", "mlp"),
)

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, ``torch.compile`` and activation checkpointing put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def matches(name: str, target_modules: str | Sequence[str] | None = None) -> bool:
    """Whether ``target_modules`` selects the parameter ``name``.

    Args:
        name: the dotted name in ``model.named_parameters()``.
        target_modules: a string is a regular expression for the whole name; in a list, each entry is such an
            expression or a dotted part of the name (``"q_proj"``, ``"mlp"``, ``"layers.3"``). None takes the
            attention and MLP projections by their usual names.
    """
    if target_modules is None:
        target_modules = DEFAULT_TARGETS
    entries = [target_modules] if isinstance(target_modules, str) else target_modules
    name = clean_name(name)
    padded = f".{name}."
    for entry in entries:
        if not isinstance(target_modules, str) and f".{entry}." in padded:
            return True
        check_expression(entry)
        if re.fullmatch(entry, name):
            return True
    return False


def is_low_rank(
    name: str, shape: Sequence[int], rank: int, rank_v: int, target_modules: str | Sequence[str] | None
) -> bool:
    """Whether the parameter gets low-rank momenta: selected by name, 2-D, and both sides exceed the rank."""
    return rank > 0 and len(shape) == 2 and min(shape) > max(rank, rank_v - 1) and matches(name, target_modules)


def explain_no_match(
    named_shapes: Iterable[tuple[str, Sequence[int]]], rank: int, target_modules: Any, rank_v: int = 1
) -> str:
    """Why no parameter is low-rank, as one line for a :class:`ConfigError`."""
    named_shapes = list(named_shapes)
    two_d = [(name, tuple(shape)) for name, shape in named_shapes if len(shape) == 2]
    selected = [(name, shape) for name, shape in two_d if matches(name, target_modules)]
    if selected:
        name, shape = max(selected, key=lambda item: min(item[1]))
        what, limit = f"rank={rank}", f"rank must be below {min(shape)}"
        if rank < min(shape) < rank_v:
            what, limit = f"rank_v={rank_v}", f"rank_v must be at most {min(shape)}"
        largest = f"the largest is {name} ({shape[0]} x {shape[1]})"
        return f"{what}: larger than what any selected matrix allows; {largest}, so {limit}"
    known = ", ".join([name for name, _ in two_d[:4]] + ["..."] * (len(two_d) > 4))
    what = "the default target_modules" if target_modules is None else f"target_modules={target_modules!r}"
    there = f"{len(two_d)} 2-D parameters: {known}" if two_d else "it has none"
    return f"{what}: matches no 2-D parameter of this model ({there})"


def param_groups(model: Any, target_modules: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Two groups for :class:`lorapre_dist.LoRAPre`: the selected 2-D weights, and the rest under plain AdamW.

    Args:
        model: a ``torch.nn.Module``.
        target_modules: as in :func:`matches`.

    Raises:
        ConfigError: nothing is selected.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Under DeepSpeed's zero.Init the parameter itself is empty and its shape is in ds_shape.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
    chosen = [(name, p) for name, p in named if len(shapes[name]) == 2 and matches(name, target_modules)]
    if not chosen:
        raise ConfigError(explain_no_match(shapes.items(), 0, target_modules))
    taken = {name for name, _ in chosen}
    rest = [(name, p) for name, p in named if name not in taken]
    return [{"params": chosen}] + ([{"params": rest, "rank": 0}] if rest else [])
