"""A gradient that is not finite on one rank: no rank of any layout steps, and not a bit changes."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist.optimizers import OPTIMIZERS
from tests.covering import covering, some

from .harness import run_ranks
from .non_finite_cases import skip_case

LAYOUTS = [("fsdp2", 2), ("hsdp", 4), ("fsdp1", 2), ("fsdp1 hybrid", 4), ("ddp", 2), ("ddp replicated", 2), ("tp", 2)]
LAYOUTS += [("tp+fsdp2", 4), ("pp", 2), ("pp+fsdp2", 4), ("ep+fsdp2 1", 4), ("tp+pp+fsdp2", 8)]


def check(results):
    for result in results:
        assert result["changed"] == result["differs"] == []
        assert result["skipped"] == 1
        assert "gradients were not finite in 2 steps in a row" in result["said"]
    assert any(".weight" in result["said"] for result in results)


@pytest.mark.parametrize("layout, world", some(LAYOUTS, LAYOUTS[:-1]))
def test_no_rank_steps(layout, world):
    arguments = {"optimizer": "LoRAPre", "device_decides": False, "dtype": torch.float32}
    check(run_ranks(world, skip_case, layout=layout, **arguments))


@pytest.mark.parametrize("name, layout", covering(OPTIMIZERS, ["fsdp2", "ddp", "tp"], strength=1))
def test_the_device_decides_for_every_optimizer(name, layout):
    arguments = {"optimizer": name, "device_decides": True, "dtype": torch.float64}
    check(run_ranks(2, skip_case, layout=layout, **arguments))
