"""Factors in other forms, and other parameters' state, under DeepSpeed; what cannot be released there."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .kept_cases import kept_case, refused_case

OPTIONS = [
    {"state_dtype": "8bit", "embeddings": "low_rank"},
    {"state_dtype": "bf16", "other_state": "adafactor"},
    {"other_state": "adamw8bit"},
]


@pytest.mark.parametrize("stage, world", [(1, 2), (2, 3), (3, 3)])
def test_zero_keeps_what_one_device_keeps(tmp_path, stage, world):
    """fp32 sums in another order round a few numbers the other way, by 1/127 of the largest beside them."""
    for result in run_ranks(world, kept_case, stage=stage, options=OPTIONS, folder=str(tmp_path)):
        for error, differing, resumed in result:
            assert error <= 1e-4
            assert differing <= 0.02
            assert resumed <= 1e-4


def test_gradients_are_not_released_under_deepspeed():
    for said in run_ranks(2, refused_case):
        assert len(said) == 3
        for text in said:
            assert "release_gradients=True: DeepSpeed's engine collects gradients" in text and "FSDP2" in text
