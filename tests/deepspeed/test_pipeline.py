"""DeepSpeed's pipeline: every number of stages gives the dense reference's parameters."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .cases import OTHER_PARAMS
from .pipeline_cases import equality_case

STEPS = 20
FP32 = 1e-5  # the contract: after 20 steps, fp32 summation order is all that differs
COMBOS = [(1, 0.0), (4, 0.5)]  # (gradient accumulation, clipping)


# What DeepSpeed makes of bf16 in a pipeline under ZeRO-0 clips gradients in bf16, as nothing else does.
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    (2, 2, 0, "fp32", COMBOS, {}, "ZeRO-0"),
    (4, 4, 0, "fp32", COMBOS[1:], {}, "ZeRO-0"),
    (4, 2, 0, "fp32", COMBOS[1:], {}, "ZeRO-0"),
    (4, 2, 1, "fp32", COMBOS, {}, "ZeRO-1"),
    (4, 2, 1, "bf16", COMBOS[1:], {}, "ZeRO-1"),
    (4, 2, 1, "bf16", COMBOS[1:], FP32_GRADIENTS, "ZeRO-1 (bf16)"),
    (2, 2, 0, "bf16", COMBOS[:1], {}, "ZeRO-1 (bf16)"),
]


@pytest.mark.parametrize("world, stages, stage, precision, combos, changes, layout", CASES)
def test_stages_match_reference(world, stages, stage, precision, combos, changes, layout):
    arguments = {"stages": stages, "stage": stage, "precision": precision, "changes": changes, "steps": STEPS}
    for result in run_ranks(world, equality_case, combos=combos, **arguments):
        for combo in result:
            assert combo["error"] <= FP32 and combo["layout"] == layout, combo


@pytest.mark.parametrize("optimizer", OTHER_PARAMS)
def test_other_optimizers_match_reference(optimizer):
    arguments = {"stages": 2, "stage": 1, "precision": "fp32", "combos": COMBOS[1:], "steps": STEPS}
    for result in run_ranks(4, equality_case, optimizer=optimizer, **arguments):
        assert result[0]["error"] <= FP32, result
