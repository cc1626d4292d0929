"""What parameters are called, on each rank so that no two of the whole model have one name.

DeepSpeed's ``PipelineModule`` calls a parameter by the number of its layer among all layers (``"3.up_proj.weight"``)
or by the key of what is tied (``"tied_modules.embed.weight"``), which is the same on any number of stages. With
:func:`name_layers` it has the plain model's name, and a checkpoint goes on without a pipeline, and back.

A rank's experts (``deepspeed.moe.layer.MoE``) are numbered by DeepSpeed from 0 on every rank; here by their place among
all experts, which is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist

from ...config import ConfigError
from ...config.param_groups import clean_name

_NAMES = "_lorapre_names"
_EXPERTS = "experts.deepspeed_experts"


def name_layers(module: Any, names: Mapping[str, str]) -> None:
    """Call the parameters of a ``PipelineModule`` as a plain model does; to be called before the engine is built.

    Args:
        module: of this rank's stage.
        names: the beginnings of names, of parts that are whole, with what stands there in the plain model, for all
            layers: ``{"tied_modules.embed": "model.embed_tokens", "1": "model.layers.0", ...}``. The longest that fits
            a name counts.

    Raises:
        ConfigError: a number or key is none of this pipeline's, or two parameters of this stage get one name.
    """
    layers = {str(k) for k in range(len(getattr(module, "_layer_specs", ())))}
    for given, plain in names.items():
        first = str(given).split(".")[0]
        if not (isinstance(given, str) and isinstance(plain, str)) or first not in layers | {"tied_modules"}:
            raise ConfigError(
                f"name_layers: {given!r}: must begin with the number of one of the {len(layers)} layers, or with "
                f"'tied_modules.KEY', and stand for the beginning of a name"
            )
    setattr(module, _NAMES, dict(names))
    named = naming(module)
    found: dict[str, str] = {}
    for own, _ in module.named_parameters():
        if found.setdefault(named(own), own) != own:
            raise ConfigError(f"name_layers: {own!r} and {found[named(own)]!r} would both be called {named(own)!r}")


def naming(module: Any) -> Callable[[str], str]:
    """How what ``module`` calls a tensor is called; of experts once the engine has made their groups."""
    names: dict[str, str] = getattr(module, _NAMES, {})
    first = {clean_name(f"{name}.{_EXPERTS}"): layer for name, layer in expert_layers(module)}

    def named(name: str) -> str:
        name = clean_name(name)
        for begin, layer in first.items():
            if name.startswith(f"{begin}."):
                local, _, rest = name.removeprefix(f"{begin}.").partition(".")
                name = f"{begin}.{dist.get_rank(layer.ep_group) * layer.num_local_experts + int(local)}.{rest}"
        for begin in _beginnings(name):
            if begin in names:
                return names[begin] + name[len(begin) :]
        return name

    return named


def check_tied(module: Any) -> None:
    """Refuse a pipeline's tied layers that are tied in part: stages would train unlike parameters of one name.

    Raises:
        ConfigError: which is not tied.
    """
    for key, comm in getattr(module, "tied_comms", {}).items():
        for name, p in comm["module"].named_parameters():
            if name not in comm["weight_attr"] and p.requires_grad and len(comm["ranks"]) > 1:
                raise ConfigError(
                    f"tied layer {key!r}: {name!r} is not in its tied_weight_attr, and each stage would train a copy "
                    "of its own: name it there"
                )


def expert_layers(module: Any) -> list[tuple[str, Any]]:
    """Each layer of experts, by its name, whose ranks DeepSpeed has told it: ``ep_group`` and ``num_local_experts``."""
    named = [(name, layer) for name, layer in module.named_modules() if hasattr(layer, "num_local_experts")]
    return [(name, layer) for name, layer in named if getattr(layer, "ep_group", None) is not None]


def _beginnings(name: str) -> Iterator[str]:
    """The name, and it without its last parts."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def of_parameters(engine: Any) -> dict[Any, str]:
    """The names of an engine's parameters."""
    named = naming(engine.module)
    return {p: named(name) for p, name in engine.param_names.items()}
