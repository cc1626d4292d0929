"""Which parameters of an engine are parts of matrices, under DeepSpeed's AutoTP and under Megatron's conventions."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ...config import ConfigError
from ...config.param_groups import shape_of
from ...core.comm import all_ranks
from ...layouts import tensor_parallel
from ...layouts.base import Layout
from ...layouts.tensor_parallel import Split
from . import names, ranks

_OF_AUTOTP = "ds_autotp_universal_checkpoint_meta"


def of_engine(engine: Any) -> dict[str, Split]:
    """The parameters of which this rank has a part, by name; a collective over its tensor-parallel ranks.

    Raises:
        ConfigError: one is split otherwise than into rows or columns, or is frozen.
    """
    group = ranks.tensor_parallel(engine)
    if group is None:
        return {}
    named = names.of_parameters(engine)
    dims = {name: _dim(name, p) for p, name in named.items()}
    parts = {name: (shape_of(p), dim) for p, name in named.items() if (dim := dims[name]) is not None}
    frozen = [name for p, name in named.items() if name in parts and not p.requires_grad]
    if frozen:
        raise ConfigError(f"{frozen[0]}: a frozen parameter that tensor parallelism splits is not supported; train it")
    return tensor_parallel.splits(parts, group)


def _dim(name: str, parameter: Any) -> int | None:
    """The dimension along which a parameter is split; None: it is whole on every rank."""
    told = getattr(parameter, _OF_AUTOTP, None)
    if told is not None:
        if told["replicated"] or told["partition_dim"] is None:
            return None
        fused = told["sub_param_shape"] or told["sub_param_sizes"]
        if fused or told["conversion"]["unsupported_reason"]:
            raise ConfigError(f"{name}: AutoTP splits the parts of a fused layer one by one; LoRAPre needs them apart")
        return int(told["partition_dim"])
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    if getattr(parameter, "partition_stride", 1) != 1:
        raise ConfigError(f"{name}: partition_stride={parameter.partition_stride}: LoRAPre supports 1")
    dim = getattr(parameter, "partition_dim", None)
    if dim not in (0, 1):
        raise ConfigError(f"{name}: tensor_model_parallel needs partition_dim=0 or 1, not {dim}")
    return int(dim)


def join(engine: Any, layout: Layout, found: dict[str, Split]) -> None:
    """Make ``layout`` one of whole parameters, in place; a collective over all ranks."""
    group = ranks.tensor_parallel(engine)
    if group is None:
        return
    copies = {tuple(dist.get_process_group_ranks(group))}
    if engine.zero_optimization_stage() or layout.world_size > 1:  # cut over data-parallel ranks as well
        copies = set(all_ranks(tuple(dist.get_process_group_ranks(engine.seq_data_parallel_group)), group))
    together = sorted({rank for some in copies for rank in some})
    tensor_parallel.join(layout, found, together, first=dist.get_rank(group) == 0)
