"""Matrices split over tensor-parallel ranks, and cut again by ZeRO, are stepped as one."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .parts_cases import equality_case

STEPS = 20
FP32 = 1e-5  # the contract: after 20 steps, fp32 summation order is all that differs


@pytest.mark.parametrize(
    "world, stage, precision, clip",
    [(2, 0, "fp32", 0.5), (4, 0, "fp32", 0.0), (4, 1, "fp32", 0.5), (4, 2, "bf16", 0.5), (4, 1, "bf16", 0.0)],
)
def test_parts_match_reference(world, stage, precision, clip):
    arguments = {"size": 2, "stage": stage, "precision": precision, "clip": clip, "steps": STEPS}
    for result in run_ranks(world, equality_case, **arguments):
        assert result["error"] <= FP32, result
