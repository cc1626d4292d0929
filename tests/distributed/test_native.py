"""FSDP2, HSDP, FSDP1, DDP and tensor parallel give the single-process result."""

from __future__ import annotations

import pytest
import torch

from tests.covering import covering, some
from tests.shapes import state_bytes

from .harness import run_ranks
from .native_cases import (
    OPTIONS,
    SHAPES,
    equality_case,
    factors_case,
    habits_case,
    policy_case,
    refused_case,
    state_case,
)

WORLDS = {
    "fsdp2": (1, 2, 3, 4),
    "hsdp": (4,),
    "fsdp1": (2, 3, 4),
    "fsdp1 grad_op": (2,),
    "fsdp1 hybrid": (4,),
    "ddp": (1, 2, 3, 4),
    "ddp replicated": (2, 3),
    "tp": (2, 3, 4),
    "tp+fsdp2": (4,),
    "pp": (2,),
    "pp+fsdp2": (4,),
    "cp+fsdp2": (4,),
    "ep+fsdp2 0": (4,),
    "ep+fsdp2 1": (4,),
    "ep+fsdp2 2": (4,),
    "tp+pp+fsdp2": (8,),
}
CASES = [(layout, world) for layout, worlds in WORLDS.items() for world in worlds]
#: Between others of the same layout; some of the other optimizers run there.
BETWEEN = [("fsdp2", 2), ("fsdp1", 2), ("ddp", 2), ("ddp", 3), ("ddp replicated", 3), ("tp", 2)]
OTHERS = [name for name in OPTIONS if name != "LoRAPre"]


@pytest.mark.parametrize("layout, world", some(CASES, [case for case in CASES if case not in BETWEEN]))
def test_parameters_match_reference_in_fp64(layout, world, steps):
    for result in run_ranks(world, equality_case, layout=layout, dtype=torch.float64, steps=steps):
        assert result["error"] <= 1e-10, (result["name"], result["error"])


@pytest.mark.parametrize(
    "optimizer, layout, world",
    [
        *[("LoRAPreMuon", *where) for where in [("fsdp2", 3), ("hsdp", 4), ("fsdp1", 3), ("ddp", 2), ("tp", 3)]],
        *[(name, "fsdp1", 2) for name in OTHERS if name != "LoRAPreMuon"],
        *covering(OTHERS, ["tp+fsdp2", "pp+fsdp2", *(f"ep+fsdp2 {dim}" for dim in (0, 1, 2))], [4], strength=1),
        ("LoRAPreMuon", "tp+pp+fsdp2", 8),
        *[pytest.param(name, "tp+pp+fsdp2", 8, marks=pytest.mark.exhaustive) for name in OTHERS[1:]],
    ],
)
def test_other_optimizers_match_reference_in_fp64(layout, world, optimizer, steps):
    """Blocks of 256 bytes: no matrix is assembled, to be made orthogonal by one rank."""
    arguments = {"layout": layout, "optimizer": optimizer, "dtype": torch.float64, "steps": steps, "block": 256}
    for result in run_ranks(world, equality_case, **arguments):
        assert result["error"] <= 1e-10, (result["name"], result["error"])


FP32 = [("fsdp2", 3), ("fsdp1", 3), ("ddp", 4), ("tp", 3), ("tp+fsdp2", 4), ("pp+fsdp2", 4), ("ep+fsdp2 2", 4)]


@pytest.mark.parametrize("where, options", covering(FP32, [{}, {"variant": "paper", "damping": 1e-3}], strength=1))
def test_parameters_match_reference_in_fp32(where, options, steps):
    """The printed damping amplifies rounding where a gradient is nearly low-rank, as it is here: hence another one."""
    layout, world = where
    for result in run_ranks(world, equality_case, layout=layout, dtype=torch.float32, steps=steps, options=options):
        assert result["error"] <= 1e-5, (result["name"], result["error"])


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1", "ddp"])
def test_compiled_models_gradient_scalers_schedules_and_hooks(layout):
    for result in run_ranks(2, habits_case, layout=layout):
        assert result["error"] <= 1e-5
        assert result["calls"] == ["pre", "post"] * 5 and result["scale"] == 2.0**9


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_deals_out_the_state(world):
    """Llama-60M's matrices at rank 128: each rank holds a world'th within 10%; replicated, all of it."""
    want = state_bytes("llama-60m", 128, 16)
    for sharded, replicated in run_ranks(world, state_case, model="llama-60m", lora_rank=128):
        assert abs(sharded - want / world) <= 0.1 * want / world
        assert replicated == pytest.approx(want)


@pytest.mark.parametrize("layout, world", [("tp", 4), ("tp+fsdp2", 4), ("tp+pp+fsdp2", 8)])
def test_no_factor_is_replicated_over_tensor_parallel_ranks(layout, world):
    """Rows of B and columns of A lie on one rank each, in equal parts but for one row and one column."""
    held = run_ranks(world, factors_case, layout=layout)
    ranks = 4  # that share a matrix
    for name, (p, q) in SHAPES.items():
        matrix = f"layers.{name}.weight"
        for key, side, whole in (("m_B", 0, p), ("v_B", 0, p), ("rms_row", 0, p), ("m_A", 1, q), ("v_A", 1, q)):
            counts = [found[matrix, key][side] for found in held if (matrix, key) in found]
            assert sum(counts) == whole and len(counts) == ranks, (name, key, counts)
            assert max(counts) <= whole / ranks + 1, (name, key, counts)


@pytest.mark.parametrize("policy", ["bf16", "cpu offload"])
def test_fsdp2_policies(policy):
    """Mixed precision and CPU offload leave fp32 shards and gradients, so the ranks and one process agree on them."""
    (alone, _), *_ = run_ranks(1, policy_case, policy=policy)
    for got, device in run_ranks(2, policy_case, policy=policy):
        assert device == "cpu"
        # bf16 compute: gradients of a smaller shard are reduced in another order, in fp32.
        assert all(torch.allclose(got[n], alone[n], rtol=1e-4, atol=1e-6) for n in alone)


def test_no_collective_where_each_rank_has_all():
    for result in run_ranks(2, equality_case, layout="ddp replicated", dtype=torch.float64, steps=2):
        assert result["calls"] == {}
    for result in run_ranks(2, equality_case, layout="ddp", dtype=torch.float64, steps=2):
        assert set(result["calls"]) == {"finite", "broadcast parameters"}


def test_flat_parameters_are_refused():
    for text in run_ranks(2, refused_case):
        assert "use_orig_params=True" in text
