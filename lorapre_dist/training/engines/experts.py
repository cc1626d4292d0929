"""Expert parallelism for Hugging Face's mixtures of experts under FSDP2: each rank has some of the experts of a layer.

The ranks of a group, neighbours, give each other their tokens (an all-gather), each works out what its experts make of
all of them, and the results are summed to the ranks that the tokens came from (a reduce-scatter). A layer's experts are
stacks of matrices, split over the group along dim 0 and by FSDP2 over the ranks that have the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lorapre_dist.config import ConfigError

Exchange = Callable[[Tensor, Any], Tensor]


def split(model: Any, parts: int, device: str, **options: Any) -> None:
    """Split the experts of every layer over groups of so many ranks, and over the others by FSDP2, in place.

    Args:
        model: without storage, before anything else of it is wrapped.
        options: of ``fully_shard``.

    Raises:
        ConfigError: the model has no such experts, or their number is no multiple of ``parts``.
    """
    layers = [module for module in model.modules() if _is_stack(module)]
    if not layers:
        raise ConfigError(
            f"--expert {parts}: {type(model).__name__} has no experts in stacks; take a mixture of experts such as "
            "--model mixtral-tiny"
        )
    mesh = init_device_mesh(device, (dist.get_world_size() // parts, parts), mesh_dim_names=("data", "expert"))
    for layer in layers:
        if layer.num_experts % parts:
            raise ConfigError(f"--expert {parts}: must divide the {layer.num_experts} experts of a layer")
        _split(layer, mesh["expert"])
        fully_shard(layer, mesh=mesh["data"], **options)
    model.config._experts_implementation = "eager"  # the one that passes over tokens of other ranks' experts


def _is_stack(module: Any) -> bool:
    """Whether a module has the weights of several experts: all its parameters, stacks of so many matrices."""
    own = list(module.parameters(recurse=False))
    count = getattr(module, "num_experts", None)
    return bool(own) and all(p.ndim == 3 and len(p) == count for p in own)


def _split(layer: Any, mesh: DeviceMesh) -> None:
    index, size = mesh.get_local_rank(), mesh.size()
    for name, p in list(layer.named_parameters(recurse=False)):
        part = p.detach().chunk(size)[index]
        layer._parameters[name] = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
    layer.forward = functools.partial(_forward, layer, mesh.get_group())


def _forward(layer: Any, group: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the experts of all ranks make of this rank's tokens.

    Args:
        hidden: n x h.
        chosen: n x k, numbers of experts.
        weights: n x k, of each of them.
    """
    size, index = dist.get_world_size(group), dist.get_rank(group)
    here = layer.num_experts // size
    every, share = (_Exchange.apply(x, group, _gathered, _scattered) for x in (hidden, weights))
    local = _gathered(chosen, group) - index * here
    local = torch.where((local >= 0) & (local < here), local, here)
    parts = {n: _Scaled.apply(p.to_local(), 1 / size) for n, p in layer.named_parameters(recurse=False)}
    out = type(layer).forward(_Local(layer, parts, here), every, local, share)
    # No expert here may be chosen, but all ranks of FSDP2 reduce the same gradients.
    out = out + sum(p.flatten()[0] * 0 for p in parts.values())
    return _Exchange.apply(out, group, _scattered, _gathered)


class _Local:
    """A layer with this rank's experts alone."""

    def __init__(self, layer: Any, parts: dict[str, Tensor], count: int) -> None:
        self.__dict__.update(parts, num_experts=count, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Exchange(torch.autograd.Function):
    """``there`` of tokens and the ranks' group; gradients take the way ``back``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, there: Exchange, back: Exchange) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.group), None, None, None


class _Scaled(torch.autograd.Function):
    """A parameter whose gradient is scaled: it is of the tokens of a whole group, over which FSDP2 takes no mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    """Tokens of all ranks from those of each."""
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scattered(x: Tensor, group: Any) -> Tensor:
    """Of what each rank has of all tokens the sum, for this rank's tokens."""
    out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out
