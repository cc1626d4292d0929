"""``overlap`` under DeepSpeed: the same bits, with a step that is skipped and across a resume."""

from __future__ import annotations

import pytest

from lorapre_dist.optimizers import OPTIMIZERS
from tests.distributed.harness import run_ranks

from .non_finite_cases import overlap_case


@pytest.mark.parametrize("stage, world, resumes", [(0, 2, False), (1, 3, False), (2, 2, True), (3, 3, True)])
def test_the_same_bits(stage, world, resumes, exhaustive, tmp_path):
    """Under ZeRO-3 the optimizer steps once for every sub-group, of which there are many here."""
    few = {0: ["LoRAPreAdafactor"], 1: ["LoRAPreSGD", "LoRAPreLion"], 2: ["LoRAPre"], 3: ["LoRAPre", "LoRAPreMuon"]}
    optimizers = list(OPTIMIZERS) if exhaustive else few[stage]
    arguments = {"stage": stage, "optimizers": optimizers, "folder": str(tmp_path) if resumes else None}
    for result in run_ranks(world, overlap_case, timeout=400, **arguments):
        assert result == {name: [] for name in optimizers}
