"""Which parameters are low-rank matrices: matching by name, shape and rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .checks import shown
from .config import ConfigError, check_expression

# Attention and MLP projections under the names that Llama, Mistral, Qwen, Gemma, Phi, GPT-2, GPT-NeoX, OPT, Falcon,
# BLOOM, BERT, T5 and Meta's own Llama code give them.
DEFAULT_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj"),
    *("gate_up_proj", "fc1", "fc2", "query", "key", "value", "query_key_value", "dense", "dense_h_to_4h"),
    *("dense_4h_to_h", "c_attn", "c_proj", "c_fc", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "wi", "wi_0", "wi_1"),
    *("q", "k", "v", "o", "in_proj_weight", "linear1", "linear2", "self_attn", "attn", "mlp"),
)

# Routers of mixtures of experts: small, sensitive, and under "mlp" in most models.
_ROUTERS = ("gate", "router", "shared_expert_gate")

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, ``torch.compile`` and activation checkpointing put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def parameter_name(name: str) -> str:
    """The parameter that ``name`` belongs to: ``"experts.w1"`` for ``"experts.w1[3]"``, its fourth matrix."""
    return re.sub(r"\[\d+\]$", "", name)


def matches(name: str, target_modules: str | Sequence[str] | None = None) -> bool:
    """Whether ``target_modules`` selects the parameter ``name``.

    Args:
        name: the dotted name in ``model.named_parameters()``.
        target_modules: a string is a regular expression for the whole name; in a list, each entry is such an
            expression or a dotted part of the name (``"q_proj"``, ``"mlp"``, ``"layers.3"``). None takes the
            attention and MLP projections by their usual names, without the routers of mixtures of experts.
    """
    name = clean_name(parameter_name(name))
    padded = f".{name}."
    if target_modules is None:
        if any(f".{router}." in padded for router in _ROUTERS):
            return False
        target_modules = DEFAULT_TARGETS
    entries = [target_modules] if isinstance(target_modules, str) else target_modules
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
    """Whether the parameter gets low-rank momenta: selected by name, and both sides exceed the rank.

    Args:
        shape: of a matrix, or of a stack of them (experts x p x q).
    """
    if rank < 1 or len(shape) not in (2, 3) or min(shape[-2:]) <= max(rank, rank_v - 1):
        return False
    return matches(name, target_modules)


def explain_no_match(
    named_shapes: Iterable[tuple[str, Sequence[int]]], rank: int, target_modules: Any, rank_v: int = 1
) -> str:
    """Why no parameter is low-rank, as one line for a :class:`ConfigError`."""
    named_shapes = list(named_shapes)
    two_d = [(name, tuple(shape)) for name, shape in named_shapes if len(shape) in (2, 3)]
    selected = [(name, shape) for name, shape in two_d if matches(name, target_modules)]
    if selected:
        name, shape = max(selected, key=lambda item: min(item[1][-2:]))
        side = min(shape[-2:])
        what, limit = f"rank={rank}", f"rank must be below {side}"
        if rank < side < rank_v:
            what, limit = f"rank_v={rank_v}", f"rank_v must be at most {side}"
        largest = f"the largest is {_line(name)} ({' x '.join(map(str, shape))})"
        return f"{what}: larger than what any selected matrix allows; {largest}, so {limit}"
    known = ", ".join([_line(name) for name, _ in two_d[:4]] + ["..."] * (len(two_d) > 4))
    what = "the default target_modules" if target_modules is None else f"target_modules={shown(target_modules)}"
    there = f"{len(two_d)} 2-D or 3-D parameters: {known}" if two_d else "it has none"
    return f"{what}: matches no matrix of this model ({there})"


def _line(name: str) -> str:
    return name if name.isprintable() else repr(name)


def explain_no_match_of(pairs: list[tuple[str, Any, Any]], default: Any, unnamed: bool) -> str:
    """As :func:`explain_no_match`, for (name, shape, settings of its group) of every parameter that may be low-rank."""
    config = min((c for _, _, c in pairs), key=lambda c: c.rank, default=default)
    targets = ".*" if unnamed else config.target_modules
    shapes = {name: shape for name, shape, _ in pairs}
    return explain_no_match(shapes.items(), config.rank, targets, config.resolved_rank_v)


def param_groups(model: Any, target_modules: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Two groups for :class:`lorapre_dist.LoRAPre`: selected matrices and stacks of them; the rest under plain AdamW.

    Args:
        model: a ``torch.nn.Module``.
        target_modules: as in :func:`matches`.

    Raises:
        ConfigError: nothing is selected.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Under DeepSpeed's zero.Init the parameter itself is empty and its shape is in ds_shape.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
    chosen = [(name, p) for name, p in named if len(shapes[name]) in (2, 3) and matches(name, target_modules)]
    if not chosen:
        raise ConfigError(explain_no_match(shapes.items(), 0, target_modules))
    taken = {name for name, _ in chosen}
    rest = [(name, p) for name, p in named if name not in taken]
    return [{"params": chosen}] + ([{"params": rest, "rank": 0}] if rest else [])
