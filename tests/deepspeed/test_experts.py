"""DeepSpeed's experts over expert-parallel ranks give the dense reference's parameters."""

from __future__ import annotations

import pytest
import torch

from tests.covering import some
from tests.distributed.harness import run_ranks

from .cases import OTHER_PARAMS
from .expert_cases import EXPERTS, VISIT_PARAMS, dense, equality_case, visit_case

FP32 = 1e-5  # the contract: fp32 summation order is all that differs


@pytest.mark.parametrize(
    "world, ep_size, stage, clip", [(4, 2, 1, 0.1), (4, 2, 2, 0.0), (2, 2, 0, 0.1), (4, 2, 0, 0.0), (4, 4, 1, 0.1)]
)
def test_experts_match_reference(world, ep_size, stage, clip, steps):
    results = run_ranks(world, equality_case, ep_size=ep_size, stage=stage, clip=clip, steps=steps)
    held = set().union(*(result["factors"] for result in results))
    assert len(held) == 1 + 2 * EXPERTS, held
    for result in results:
        assert result["error"] <= FP32, result


@pytest.mark.parametrize("optimizer", some(OTHER_PARAMS, ["LoRAPreMuon", "LoRAPreAdafactor"]))
def test_other_optimizers_match_reference(optimizer, steps):
    arguments = {"ep_size": 2, "stage": 2, "clip": 0.1, "steps": steps, "optimizer": optimizer}
    for result in run_ranks(4, equality_case, **arguments):
        assert result["error"] <= FP32, result


def test_resume_with_other_ranks_for_the_experts(tmp_path):
    walk = [(4, 2, 1), (2, 1, 2), (2, 2, 0), (4, 4, 1), (4, 2, 2)]
    for step in range(1, len(walk) + 1):
        torch.save(dense(0, step, 0.0, "LoRAPre", VISIT_PARAMS), tmp_path / f"reference{step}.pt")
    for step, (world, ep_size, stage) in enumerate(walk):
        arguments = {"ep_size": ep_size, "stage": stage, "folder": str(tmp_path), "step": step}
        for error, name in run_ranks(world, visit_case, **arguments):
            assert error <= FP32, (step, name)
