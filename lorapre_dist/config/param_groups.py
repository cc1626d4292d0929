"""Which parameters are low-rank matrices: matching by name, shape and rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import ConfigError, check_expression
from .checks import shown

# The words of a part of a name: ``relative_attention_bias`` has three, ``EncDecAttention`` as well.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# What looks up or shifts rather than projects, wherever in a layer's name it is said ...
_TABLES = {"emb", "wte", "wpe", "codebook", "bias", "biases"}
# ... and what does so as the name of a parameter that is not called "weight": ``rel_pos_h``, ``A_log``.
_NO_WEIGHTS = {"pos", "position", "table", "token", "tokens", "query", "queries", "latents", "log", "scale"}
_HEADS = {"head", "heads", "classifier", "classifiers", "score", "logits"}
_NORMS = {"norm", "ln", "layernorm", "rmsnorm", "batchnorm"}
# Routers of mixtures of experts: small and sensitive.
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_ADAPTERS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
# Attention and MLP by their usual names, for models that do not number their blocks, and by one of its words what lies
# between the blocks of one modality and another's.
_PROJECTIONS = {
    *("attn", "self_attn", "attention", "mlp", "ffn", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "in_proj_weight", "linear1", "linear2"),
    *("query", "key", "value", "query_key_value", "c_attn", "c_proj", "c_fc", "wq", "wk", "wv", "wo"),
    *("w1", "w2", "w3", "wi", "wi_0", "wi_1"),
}
_BRIDGES = {"projector", "merger", "connector", "aligner"}

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


def projects(name: str) -> bool:
    """Whether the parameter ``name`` is, by the structure of its name, the weight of a layer that projects.

    It lies in a numbered block (``layers.3.``), or where none is under a usual name of attention and MLP; and from the
    block on, nothing in its name says that it embeds, shifts, is a head, normalises, routes or adapts.
    """
    inside, numbered = in_block(clean_name(parameter_name(name)).split("."))
    words = [_words(part) for part in inside]
    flat = {word for part in words for word in part}
    if not (numbered or _PROJECTIONS.intersection(inside) or _BRIDGES & flat):
        return False
    if flat & _TABLES or any(word.startswith("embed") for word in flat):
        return False
    if _ROUTERS.intersection(inside) or _ADAPTERS.intersection(inside) or any(map(_is_head, words)):
        return False
    if inside[-1] != "weight":
        return not _NO_WEIGHTS.intersection(words[-1])
    layer = [part for part in words[:-1] if part]
    return not (layer and layer[-1][-1] in _NORMS)


def in_block(parts: list[str]) -> tuple[list[str], bool]:
    """The parts of a name from its innermost numbered block on, the name of the list of blocks first; all if none is.

    A number that ends the layer's own name (``to_out.0.weight``) is none of a block.
    """
    last = len(parts) - (2 if parts[-1] == "weight" else 1)
    while last > 0 and parts[last].isdigit():
        last -= 1
    numbers = [k for k in range(last) if parts[k].isdigit()]
    return (parts[max(numbers[-1] - 1, 0) :], True) if numbers else (parts, False)


def _is_head(words: list[str]) -> bool:
    """``lm_head``, but neither ``q_head`` nor ``multi_head_attention``."""
    return bool(words) and words[-1] in _HEADS and len(words[0]) > 1


def _words(part: str) -> list[str]:
    """``"norm_1"`` and ``"RMSNorm"`` both end in "norm"."""
    return [word.lower() for word in _WORD.findall(part)]


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a 3-D parameter is so many matrices, as experts are, rather than one matrix with a side in two parts.

    ``d_model x heads x head_dim``, as XLNet has its projections, and the kernels of convolutions have more slices than
    a slice has rows or columns.
    """
    words = set(_words(name))
    return not words & {"conv", "convs"} and (shape[0] <= min(shape[1:]) or bool(words & {"expert", "experts", "moe"}))


def matches(name: str, target_modules: str | Sequence[str] | None = None) -> bool:
    """Whether ``target_modules`` selects the parameter ``name``.

    Args:
        name: the dotted name in ``model.named_parameters()``.
        target_modules: a string is a regular expression for the whole name; in a list, each entry is such an
            expression or a dotted part of the name (``"q_proj"``, ``"mlp"``, ``"layers.3"``). None: see
            :func:`projects`.
    """
    if target_modules is None:
        return projects(name)
    name = clean_name(parameter_name(name))
    entries = [target_modules] if isinstance(target_modules, str) else target_modules
    for entry in entries:
        if not isinstance(target_modules, str) and f".{entry}." in f".{name}.":
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
    return _selected(name, shape, target_modules)


def _selected(name: str, shape: Sequence[int], target_modules: str | Sequence[str] | None) -> bool:
    """Whether a parameter is chosen, whatever the rank; 3-D ones that are no stacks only by the user's own choice."""
    if target_modules is None and len(shape) == 3 and not is_stack(name, shape):
        return False
    return len(shape) in (2, 3) and matches(name, target_modules)


def explain_no_match(
    named_shapes: Iterable[tuple[str, Sequence[int]]], rank: int, target_modules: Any, rank_v: int = 1
) -> str:
    """Why no parameter is low-rank, as one line for a :class:`ConfigError`."""
    named_shapes = list(named_shapes)
    two_d = [(name, tuple(shape)) for name, shape in named_shapes if len(shape) in (2, 3)]
    selected = [(name, shape) for name, shape in two_d if _selected(name, shape, target_modules)]
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
    adapters = target_modules is None and any(_ADAPTERS.intersection(name.split(".")) for name, _ in two_d)
    hint = '; LoRA adapters take AdamW unless target_modules names them: ["lora_A", "lora_B"]' if adapters else ""
    return f"{what}: matches no matrix of this model ({there}){hint}"


def _line(name: str) -> str:
    return name if name.isprintable() else repr(name)


def explain_no_match_of(pairs: list[tuple[str, Any, Any]], default: Any, unnamed: bool) -> str:
    """As :func:`explain_no_match`, for (name, shape, settings of its group) of every parameter that may be low-rank."""
    config = min((c for _, _, c in pairs), key=lambda c: c.rank, default=default)
    targets = ".*" if unnamed else config.target_modules
    shapes = {name: shape for name, shape, _ in pairs}
    return explain_no_match(shapes.items(), config.rank, targets, config.resolved_rank_v)


def layer_kinds(model: Any, named: Callable[[str], str] = clean_name) -> dict[str, str]:
    """Which parameters of ``model`` belong, by the types of their layers, to no projection, and to what instead.

    What a name does not tell. Frozen and tied parameters are there too.

    Args:
        model: a ``torch.nn.Module``, wrapped or not.
        named: gives a parameter's name from that in ``model``.

    Returns:
        ``"embedding"``, ``"convolution"``, ``"norm"`` or ``"head"`` by name of the parameter.
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    heads = set()
    for module in model.modules():
        if callable(getattr(module, "get_output_embeddings", None)):
            try:
                heads.add(id(module.get_output_embeddings()))
            except (AttributeError, NotImplementedError):  # a model that has none
                continue
    tables = (nn.Embedding, nn.EmbeddingBag)
    found = {}
    for name, module in model.named_modules():
        norm = type(module).__name__.endswith("Norm")
        kinds = {"head": id(module) in heads, "convolution": isinstance(module, _ConvNd), "norm": norm}
        kinds["embedding"] = isinstance(module, tables)
        for kind in [kind for kind, true in kinds.items() if true]:
            # weight_norm puts a kernel deeper, and a norm may wrap a block.
            for own, _ in module.named_parameters(recurse=kind != "norm"):
                found[named(f"{name}.{own}" if name else own)] = kind
    return found


def is_table_or_head(name: str) -> bool:
    """Whether a name speaks of an embedding or an output layer."""
    words = [_words(part) for part in clean_name(name).split(".")]
    embeds = any(word.startswith("embed") or word in ("wte", "wpe") for part in words for word in part)
    return embeds or any(map(_is_head, words))


def low_rank_parameters(model: Any, target_modules: str | Sequence[str] | None = None) -> list[tuple[str, Any]]:
    """Names and trainable parameters of ``model`` that are low-rank if the rank allows it: by name and type of layer.

    Args:
        model: a ``torch.nn.Module``.
        target_modules: as in :func:`matches`; then the types of the layers do not count.
    """
    others = layer_kinds(model) if target_modules is None else {}
    return [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and clean_name(name) not in others and _selected(name, shape_of(p), target_modules)
    ]


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The whole shape of a parameter, which may be partitioned: DeepSpeed's ``zero.Init`` leaves it in ``ds_shape``."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def param_groups(model: Any, target_modules: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Two groups for :class:`lorapre_dist.LoRAPre`: selected matrices and stacks of them; the rest under plain AdamW.

    Args:
        model: a ``torch.nn.Module``.
        target_modules: as in :func:`matches`.

    Raises:
        ConfigError: nothing is selected.
    """
    chosen = low_rank_parameters(model, target_modules)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not chosen:
        raise ConfigError(explain_no_match([(n, shape_of(p)) for n, p in trainable], 0, target_modules))
    taken = {name for name, _ in chosen}
    rest = [(name, p) for name, p in trainable if name not in taken]
    return [{"params": chosen}] + ([{"params": rest, "rank": 0}] if rest else [])
