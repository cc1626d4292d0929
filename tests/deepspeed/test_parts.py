"""Matrices split over tensor-parallel ranks, and cut again by ZeRO, are stepped as one."""

from __future__ import annotations

import pytest

from tests.covering import some
from tests.distributed.harness import run_ranks

from . import checkpoint_cases, pipeline_cases
from .cases import OTHER_PARAMS
from .parts_cases import DIMS, autotp_case, equality_case, visit_case

FP32 = 1e-5  # the contract: fp32 summation order is all that differs
AUTOTP = [(2, 0, "LoRAPre"), (4, 1, "LoRAPre"), (4, 2, "LoRAPre"), *((4, 1, other) for other in OTHER_PARAMS)]


@pytest.mark.parametrize(
    "world, stage, precision, clip",
    [
        (2, 0, "fp32", 0.5),
        (4, 0, "fp32", 0.0),
        (4, 1, "fp32", 0.5),
        (4, 2, "bf16", 0.5),
        (4, 1, "bf16", 0.0),
        (4, 3, "fp32", 0.5),
    ],
)
def test_parts_match_reference(world, stage, precision, clip, steps):
    arguments = {"size": 2, "stage": stage, "precision": precision, "clip": clip, "steps": steps}
    results = run_ranks(world, equality_case, **arguments)
    assert set().union(*(result["factors"] for result in results)) >= {f"{n}.weight" for n in DIMS if "proj" in n}
    for result in results:
        assert result["error"] <= FP32, result


@pytest.mark.parametrize("optimizer", some(OTHER_PARAMS, ["LoRAPreMuon", "LoRAPreSGD"]))
def test_other_optimizers_match_reference(optimizer, steps):
    arguments = {"size": 2, "stage": 1, "clip": 0.5, "steps": steps, "optimizer": optimizer}
    for result in run_ranks(4, equality_case, **arguments):
        assert result["error"] <= FP32, result


def test_resume_with_other_parts_and_whole(tmp_path):
    """Saved and loaded on the way, the run ends where the reference does that never stopped."""
    # (ranks, to a matrix; 0: a pipeline of two stages, ZeRO stage)
    walk = [(4, 2, 1), (3, 1, 3), (2, 2, 0), (4, 0, 1), (4, 2, 2), (4, 4, 0), (1, 1, 0)]
    checkpoint_cases.write_reference(str(tmp_path), len(walk))
    for step, (world, size, stage) in enumerate(walk):
        arguments = {"stage": stage, "folder": str(tmp_path), "step": step}
        if size > 1:
            results = run_ranks(world, visit_case, size=size, **arguments)
        elif size:
            results = run_ranks(world, checkpoint_cases.visit_case, precision="fp32", **arguments)
        else:
            results = run_ranks(world, pipeline_cases.visit_case, stages=2, **arguments)
        for error, name in results:
            assert error <= FP32, (step, name)


@pytest.mark.parametrize("world, stage, optimizer", some(AUTOTP, AUTOTP[:3]))
def test_autotp_matches_one_process(world, stage, optimizer, steps):
    """Gradients depend on the weights, so rounding feeds back; the contract holds all the same."""
    for result in run_ranks(world, autotp_case, stage=stage, steps=steps, optimizer=optimizer):
        assert result["error"] <= FP32, result
        assert result["split"] >= 14, result
