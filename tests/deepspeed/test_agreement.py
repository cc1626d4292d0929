"""Ranks whose JSON or model differ say so in one and the same line, under every stage."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .agreement_cases import OTHERWISE, disagreement_case, frozen_case


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_disagree_all_raise_the_same_line(stage):
    first, *others = run_ranks(2, disagreement_case, stage=stage)
    assert all(said == first for said in others)
    for name, line in first.items():
        _, words = OTHERWISE[name]
        assert line.startswith("the ranks do not agree on ") and words in line, (name, line)
        assert "on rank 0; " in line and "on rank 1" in line and "\n" not in line, (name, line)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("freeze_first", [False, True])
def test_a_parameter_may_be_frozen_or_trained_from_a_checkpoint_on(stage, freeze_first, tmp_path):
    """DeepSpeed's optimizers do not hold what is frozen: its weights are loaded, its state is not, which is said."""
    arguments = {"stage": stage, "freeze_first": freeze_first, "folder": str(tmp_path)}
    for rank, (same, warned) in enumerate(run_ranks(2, frozen_case, **arguments)):
        assert same and warned == (not freeze_first and rank == 0)
