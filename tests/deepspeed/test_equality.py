"""Under every ZeRO stage, world size and precision, DeepSpeed gives the dense reference's parameters."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .cases import SHAPES, equality_case

STEPS = 20
FP32 = 1e-5  # the contract: after 20 steps, fp32 summation order is all that differs
COMBOS = [(1, 0.0), (1, 0.5), (4, 0.0), (4, 0.5)]  # (gradient accumulation, clipping)


def check(results, steps=STEPS):
    for result in results:
        for combo in result:
            assert combo["error"] <= FP32, combo
            assert combo["steps"] <= {steps}, combo


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_match_reference(stage, world, precision):
    check(run_ranks(world, equality_case, stage=stage, precision=precision, combos=COMBOS, steps=STEPS))
