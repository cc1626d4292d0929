"""Ranks that are not all alike in data parallelism: secondary partitions, parts of a sequence."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups

from lorapre_dist.optimizers import OPTIMIZERS
from tests.covering import some
from tests.distributed.harness import RankFailure, run_ranks

from .cases import build, dense, ds_config, full_parameters, merge, params_of, slopes, train, worst

FP32 = 1e-5  # the contract: fp32 summation order is all that differs


def secondary_case(
    rank: int, world_size: int, *, steps: int, stage: int = 3, optimizer: str = "LoRAPre"
) -> dict[str, Any]:
    """hpZ of ZeRO++: a second copy of the 16-bit weights lies in pairs of ranks, what is stepped over all four."""
    params = params_of(optimizer)
    changes = {"zero_optimization": {"zero_hpz_partition_size": 2}, "optimizer": {"type": optimizer}}
    config = merge(ds_config(stage, "bf16", 1, 0.5, params), changes)
    engine = build(config, zero_init=False)
    try:
        engine(slopes(0, rank, 0, world_size))
        second = sum(p.ds_secondary_tensor is not None for p in engine.module.parameters())
        train(engine, rank, world_size, range(steps), 1)
        want = dense(OPTIMIZERS[optimizer].config_class(**params), steps, world_size, 1, 0.5, set(), False)
        error, name = worst(full_parameters(engine), want)
        return {"error": error, "name": name, "second": second}
    finally:
        engine.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        dist.barrier()


def sequences_case(
    rank: int, world_size: int, *, stage: int, mesh: bool, steps: int, optimizer: str = "LoRAPre"
) -> dict[str, Any]:
    """Ulysses: of each sequence two ranks have a part each, whose gradients DeepSpeed adds up rather than averages.

    Args:
        mesh: the JSON says so, rather than a unit for it that is given as ``mpu``.
    """
    sizes = {"sequence_parallel_size": 2, "data_parallel_size": world_size // 2} if mesh else {}
    deepspeed.init_distributed(verbose=False)
    if not mesh:
        parallel_state_sp.initialize_sequence_parallel(2)
    params = params_of(optimizer)
    config = merge(ds_config(stage, "fp32", 1, 0.5, params), {"optimizer": {"type": optimizer}, **sizes})
    engine = build(config, zero_init=False, mpu=None if mesh else parallel_state_sp)
    try:
        for step in range(steps):
            batch = {name: slope / 2 for name, slope in slopes(step, rank, 0, world_size).items()}
            engine.backward(engine(batch))
            engine.step()
        want = dense(OPTIMIZERS[optimizer].config_class(**params), steps, world_size, 1, 0.5, set(), False)
        error, name = worst(full_parameters(engine), want)
        return {"error": error, "name": name, "size": engine.sequence_parallel_size}
    finally:
        engine.destroy()
        groups.mesh_device = groups.mpu = None
        parallel_state_sp._release_sequence_parallel_groups()
        dist.barrier()


@pytest.mark.parametrize("optimizer", some(OPTIMIZERS, ["LoRAPre"]))
def test_secondary_partitions(optimizer, steps):
    for result in run_ranks(4, secondary_case, steps=steps, optimizer=optimizer):
        assert result["error"] <= FP32, result
        assert result["second"] > 0


@pytest.mark.parametrize("world, stage, mesh", [(4, 0, False), (4, 2, False), (2, 3, False), (4, 3, True)])
def test_parts_of_sequences(world, stage, mesh, steps):
    for result in run_ranks(world, sequences_case, stage=stage, mesh=mesh, steps=steps):
        assert result["error"] <= FP32, result
        assert result["size"] == 2


@pytest.mark.parametrize("optimizer", some(OPTIMIZERS, ["LoRAPreMuon"]))
def test_parts_of_sequences_under_other_optimizers(optimizer, steps):
    for result in run_ranks(4, sequences_case, stage=2, mesh=False, steps=steps, optimizer=optimizer):
        assert result["error"] <= FP32, result


def test_a_mesh_that_deepspeed_does_not_reduce_over_is_refused():
    with pytest.raises(RankFailure, match="does not add up the gradients of a sequence's parts there"):
        run_ranks(2, sequences_case, stage=1, mesh=True, steps=1)
