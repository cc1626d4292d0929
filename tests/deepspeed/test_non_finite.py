"""A gradient that is not finite changes nothing under any stage, on all ranks alike, though one rank has it."""

from __future__ import annotations

import pytest

from lorapre_dist.optimizers import OPTIMIZERS
from tests.covering import covering
from tests.distributed.harness import run_ranks

from .non_finite_cases import refused_case, skip_case

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
UNCHECKED = {"bf16": {"check_grad_overflow": False}}


def check(results, limit=1e-5):
    for rank, result in enumerate(results):
        assert result["changed"] == []
        assert result["error"][0] <= limit, result["error"]
        assert result["skipped"] == (1, 1)
        assert len(result["said"]) == (rank == 0)


@pytest.mark.parametrize(
    "stage, precision, value", covering([0, 1, 2, 3], ["fp32", "bf16"], [float("nan"), float("-inf")])
)
def test_a_step_is_skipped(stage, precision, value):
    check(run_ranks(2, skip_case, stage=stage, precision=precision, value=value))


@pytest.mark.parametrize(
    "name, stage", covering([name for name in OPTIMIZERS if name != "LoRAPre"], [0, 2, 3], strength=1)
)
def test_by_every_optimizer(stage, name):
    check(run_ranks(2, skip_case, stage=stage, precision="fp32", value=float("nan"), optimizer=name))


@pytest.mark.parametrize(
    "stage, precision, changes",
    [(1, "fp32", OFFLOAD), (2, "bf16", OFFLOAD), (3, "fp32", OFFLOAD), (2, "bf16", UNCHECKED), (2, "fp16", {})],
)
def test_with_offload_without_deepspeeds_check_and_in_fp16(stage, precision, changes):
    results = run_ranks(2, skip_case, stage=stage, precision=precision, value=float("inf"), changes=changes)
    if precision == "fp16":  # which finds its loss scale by skipping, and so says nothing
        assert all(result.pop("said") == [] for result in results)
        results = [{**result, "said": ["-"] * (rank == 0)} for rank, result in enumerate(results)]
    check(results)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_too_many_in_a_row_are_an_error_on_every_rank(stage):
    said = run_ranks(2, refused_case, stage=stage)
    assert all("gradients were not finite in 2 steps in a row" in text for text in said)
    assert any("on this rank: layers.1.up_proj.weight." in text for text in said)
