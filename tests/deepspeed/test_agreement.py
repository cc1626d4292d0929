"""Ranks whose JSON or model differ say so in one and the same line, under every stage."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .agreement_cases import OTHERWISE, disagreement_case


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_disagree_all_raise_the_same_line(stage):
    first, *others = run_ranks(2, disagreement_case, stage=stage)
    assert all(said == first for said in others)
    for name, line in first.items():
        _, words = OTHERWISE[name]
        assert line.startswith("the ranks do not agree on ") and words in line, (name, line)
        assert "on rank 0; " in line and "on rank 1" in line and "\n" not in line, (name, line)
