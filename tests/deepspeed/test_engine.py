"""Around the step: state per rank, collectives, refusals, and a real Llama."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.shapes import projections, state_bytes

from .cases import (
    buffers_case,
    equality_case,
    refused_case,
    state_bytes_case,
    types_case,
)
from .llama_cases import llama_case


@pytest.mark.parametrize("world", [2, 3, 4])
def test_state_per_rank_under_zero3(world):
    """Llama-60M's matrices at rank 128: within 2% of 4 ((r + r_v)(p + q) + p) / N bytes on every rank."""
    shapes = [shape for _, shape in projections("llama-60m")]
    want = state_bytes("llama-60m", 128, 16) / world
    for held, reported, elements in run_ranks(world, state_bytes_case, model="llama-60m", lora_rank=128):
        assert held == reported
        assert abs(held - want) <= 0.02 * want
        assert elements <= -(-sum(p * q for p, q in shapes) // world) + len(shapes)


def test_no_collective_for_matrices_owned_whole():
    """ZeRO-0, and any stage on one rank: no collective. ZeRO-2: only the ranks that share a matrix talk about it."""
    for world, stage in ((2, 0), (1, 2), (1, 3)):
        for result in run_ranks(world, equality_case, stage=stage, precision="fp32", combos=[(1, 0.0)], steps=3):
            assert result[0]["calls"] == {}
    steps = 3
    for result in run_ranks(2, equality_case, stage=2, precision="fp32", combos=[(1, 0.0)], steps=steps):
        # One matrix lies across the boundary of two partitions: seven collectives a step.
        solves = ("reduce Gram of B", "send inverse of B", "reduce Gram of A", "send gauge")
        assert result[0]["calls"] == dict.fromkeys(("gather A", "edge rows", "reduce Z", *solves), steps)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_engine_knows_the_types_of_layers(stage):
    for doors in zip(*run_ranks(2, types_case, stage=stage), strict=True):
        assert set.union(*doors) == {"layers.0.up.weight"}


@pytest.mark.parametrize("door", ["lorapre", "deepspeed"])
@pytest.mark.parametrize(
    "changes, params, words",
    [
        ({}, {"rnak": 4}, "did you mean 'rank'"),
        ({}, {"rank": 1000}, "rank=1000"),
        ({}, {"rank": 0}, "rank=0"),
        ({}, {"betas": [0.9, 1.0]}, "betas"),
        ({}, {"target_modules": ["nothing_like_it"]}, "matches no matrix"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}}, {}, "nvme"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, {}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, {}, "elastic_checkpoint"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}, "torch_autocast"),
    ],
)
def test_refusals_are_one_clear_line(changes, params, words, door):
    for text in run_ranks(2, refused_case, changes=changes, params=params, door=door):
        assert words in text
        assert "\n" not in text


@pytest.mark.parametrize("stage", [2, 3])
def test_a_real_llama_matches_one_process(stage):
    """Gradients now depend on the weights, so rounding feeds back; the contract holds all the same."""
    for error, name, loss in run_ranks(2, llama_case, stage=stage, steps=20):
        assert error <= 1e-5, name
        assert loss < 4.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks with a GPU have no buffers in shared memory")
def test_the_buffers_of_ranks_have_no_name_and_so_go_with_them():
    for held in run_ranks(2, buffers_case):
        assert len(held) == 2 and all(name.endswith(" (deleted)") for name in held), held
