"""Under every ZeRO stage, world size and precision, DeepSpeed gives the dense reference's parameters."""

from __future__ import annotations

import itertools
from typing import Any

import deepspeed
import pytest
import torch

import lorapre_dist
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.param_groups import parameter_name
from tests import oracle
from tests.covering import covering
from tests.distributed.harness import run_ranks

from .cases import (
    OTHER_PARAMS,
    PARAMS,
    SHAPES,
    Net,
    dense,
    ds_config,
    equality_case,
    factor_at,
    full_parameters,
    train,
    worst,
)


def groups_case(rank: int, world_size: int, *, stage: int, steps: int) -> tuple[float, str, set[str]]:
    """Three groups with their own settings, and a scheduler over all of them."""
    options = {**PARAMS, "weight_decay": 0.0}
    config = ds_config(stage, "fp32", 1, 0.0, options)
    model = Net()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    special = {
        "layers.0.q_proj.weight": {"rank": 6, "rank_v": 2, "lr": 0.02},
        "layers.1.up_proj.weight": {"rank": 0, "lr": 0.003, "weight_decay": 0.1},
        "layers.1.sometimes.down_proj.weight": {"rank": 0},
    }
    rest = [p for n, p in named.items() if n not in special]
    groups = [{"params": rest}, *({"params": [named[n]], **extra} for n, extra in special.items())]

    def scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)

    engine = lorapre_dist.initialize(model=model, model_parameters=groups, config=config, lr_scheduler=scheduler)[0]
    train(engine, rank, world_size, range(steps), 1)
    want = {}
    for name in named:
        mine = LoRAPreConfig(**{**options, **special.get(name, {})})
        want[name] = dense(mine, steps, world_size, 1, 0.0, set(), True)[name]
    error, name = worst(full_parameters(engine), want)
    low_rank = set(lorapre_dist.deepspeed.base_optimizer(engine).factors())
    engine.destroy()
    return error, name, low_rank


def client_case(rank: int, world_size: int, *, stage: int, steps: int) -> tuple[float, str]:
    """A LoRAPre that the caller builds and hands to ``deepspeed.initialize(optimizer=...)``."""
    config = ds_config(stage, "fp32", 1, 0.0, {})
    del config["optimizer"]
    model = Net()
    optimizer = lorapre_dist.LoRAPre(model.named_parameters(), **PARAMS)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    train(engine, rank, world_size, range(steps), 1)
    want = dense(LoRAPreConfig(**PARAMS), steps, world_size, 1, 0.0, set(), False)
    error, name = worst(full_parameters(engine), want)
    engine.destroy()
    return error, name


FP32 = 1e-5  # the contract: fp32 summation order is all that differs
COMBOS = [(1, 0.0), (4, 0.5), (1, 0.5), (4, 0.0)]  # (gradient accumulation, clipping)
LOW_RANK_OF_GROUPS = ("0.q_proj", "0.o_proj", "1.experts.up_proj")
CPU_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}


def check(results, steps):
    for result in results:
        for combo in result:
            assert combo["error"] <= FP32, combo
            assert combo["steps"] <= {steps}, combo


@pytest.mark.parametrize(
    "world, precision",
    [
        *[(world, "fp32") for world in (2, 1, 3)],
        *[(2, precision) for precision in ("bf16", "fp16")],
        *[pytest.param(*case, marks=pytest.mark.exhaustive) for case in itertools.product((1, 3), ("bf16", "fp16"))],
    ],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_match_reference(stage, world, precision, exhaustive, steps):
    combos = COMBOS if exhaustive else COMBOS[:2] if (world, precision) == (2, "fp32") else COMBOS[1:2]
    check(run_ranks(world, equality_case, stage=stage, precision=precision, combos=combos, steps=steps), steps)


@pytest.mark.parametrize(
    "optimizer, stage, world, precision",
    [
        *[("LoRAPreMuon", *case) for case in [(1, 2, "bf16"), (2, 3, "fp32"), (3, 2, "fp16")]],
        *[(name, 3, 3, "fp32") for name in OTHER_PARAMS],
    ],
)
def test_other_optimizers_match_reference(stage, world, precision, optimizer, steps):
    """With a schedule, which the learning rate of the parameters under AdamW follows."""
    arguments = {"stage": stage, "precision": precision, "optimizer": optimizer, "combos": [(1, 0.5)], "steps": steps}
    check(run_ranks(world, equality_case, **arguments), steps)


@pytest.mark.parametrize("stage, combo", covering([0, 1, 2, 3], [(1, 0.5), (4, 0.0)], strength=1))
def test_overflow_leaves_factors_and_step_counts(stage, combo, steps):
    """An fp16 overflow at step 5, on the last rank only: nothing of it reaches weights, factors or step counts."""
    results = run_ranks(2, equality_case, stage=stage, precision="fp16", combos=[combo], steps=steps, overflow_at=5)
    check(results, steps=steps - 1)
    assert all(combo["skipped"] == 1 for result in results for combo in result)


@pytest.mark.parametrize("stage, precision, combo", covering([1, 2, 3], ["fp32", "bf16"], [(1, 0.0), (4, 0.5)]))
def test_optimizer_offload_to_cpu(stage, precision, combo, steps):
    arguments = {"stage": stage, "precision": precision, "combos": [combo], "steps": steps}
    check(run_ranks(2, equality_case, changes=CPU_OFFLOAD, **arguments), steps)


@pytest.mark.parametrize(
    "changes, layout",
    [
        ({"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}, "ZeRO-1 (bf16)"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "ZeRO-2"),
        ({"zero_optimization": {"stage": 2, "parameter_alignment": True}}, "ZeRO-2"),
        ({"zero_optimization": {"stage": 2, "reduce_scatter": False, "overlap_comm": False}}, "ZeRO-2"),
        ({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}, "ZeRO-1"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 1000000000}}, "ZeRO-3"),
        ({"zero_optimization": {"stage": 3, "overlap_comm": False, "contiguous_gradients": False}}, "ZeRO-3"),
    ],
    ids=["bf16-optimizer", "round-robin", "aligned", "all-reduce", "not-contiguous", "one-sub-group", "no-overlap"],
)
def test_other_settings(changes, layout, exhaustive, steps):
    stage = changes["zero_optimization"]["stage"]
    combos = [(4, 0.5), (1, 0.0)][: 1 + exhaustive]
    # Round-robin order confuses DeepSpeed's own way to read fp32 master weights: there the weights are fp32 themselves.
    precision = "fp32" if changes["zero_optimization"].get("round_robin_gradients") else "bf16"
    results = run_ranks(3, equality_case, stage=stage, precision=precision, combos=combos, steps=steps, changes=changes)
    check(results, steps)
    assert {combo["layout"] for result in results for combo in result} == {layout}


@pytest.mark.parametrize(
    "door, zero_init",
    [
        ("lorapre", False),
        ("deepspeed", True),
        pytest.param("lorapre", True, marks=pytest.mark.exhaustive),
        pytest.param("deepspeed", False, marks=pytest.mark.exhaustive),
    ],
)
def test_both_doors_match_the_same_parameters(door, zero_init, steps):
    results = run_ranks(
        2,
        equality_case,
        stage=3,
        precision="fp32",
        combos=[(1, 0.0)],
        steps=steps,
        door=door,
        zero_init=zero_init,
    )
    check(results, steps)
    # Every rank holds a part of every matrix, but of the experts only of those that its part of the stack touches.
    named = {f"{name}.weight": torch.empty(shape) for name, shape in SHAPES.items() if "proj" in name}
    expected = oracle.each_expert(named).keys()
    alone = {name for name in expected if "[" not in name}
    for k in range(len(results[0])):
        held = [set(result[k]["factors"]) for result in results]
        assert set.union(*held) == expected and set.intersection(*held) >= alone


@pytest.mark.parametrize("stage, variant", covering([2, 3], ["stable", "paper"], strength=1))
def test_options_reach_the_core(stage, variant, steps):
    params = {"variant": variant, "residual": 0.2, "gammas": [0.1, 0.05], "damping": 1e-3, "scale": 0.1, "eps": 1e-6}
    params |= {"seed": 3, "init_std": 0.05, "rank_v": 3, "max_update": 1.5}
    check(
        run_ranks(3, equality_case, stage=stage, precision="fp32", combos=[(1, 0.0)], steps=steps, params=params), steps
    )


@pytest.mark.parametrize(
    "stage, precision, optimizer",
    [(1, "fp32", "LoRAPreMuon"), (2, "bf16", "LoRAPre"), (3, "fp32", "LoRAPreAdafactor"), (3, "bf16", "LoRAPre")],
)
def test_steps_by_matrices_match_reference(stage, precision, optimizer, steps):
    arguments = {"stage": stage, "precision": precision, "optimizer": optimizer, "combos": [(1, 0.5)], "steps": steps}
    check(run_ranks(3, equality_case, params={"work": "matrices"}, **arguments), steps)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_keep_their_settings(stage, steps):
    """Per-group lr, weight decay, rank and ``rank: 0`` are honoured, also where one schedule drives all groups."""
    for error, name, low_rank in run_ranks(2, groups_case, stage=stage, steps=steps):
        assert error <= FP32, name
        assert {parameter_name(n) for n in low_rank} <= {f"layers.{n}.weight" for n in LOW_RANK_OF_GROUPS}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_optimizer_built_by_the_caller(stage, steps):
    for error, name in run_ranks(2, client_case, stage=stage, steps=steps):
        assert error <= FP32, name
