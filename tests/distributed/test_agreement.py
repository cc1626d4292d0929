"""Ranks that have built different things say so, in one and the same line; a gradient that one lacks is zero there."""

from __future__ import annotations

import pytest

from .agreement_cases import OTHERWISE, disagreement_case, lacking_case
from .harness import run_ranks


@pytest.mark.parametrize(
    "world, layouts", [(2, ["fsdp2", "fsdp1", "ddp", "ddp replicated"]), (4, ["hsdp", "tp+fsdp2"])]
)
def test_ranks_that_disagree_all_raise_the_same_line(world, layouts, exhaustive):
    first, *others = run_ranks(world, disagreement_case, layouts=layouts, exhaustive=exhaustive)
    assert all(said == first for said in others)
    for (layout, name), line in first.items():
        _, words = OTHERWISE[name]
        assert line.startswith("the ranks do not agree on ") and words in line, (layout, name, line)
        assert f"on rank {world - 1}" in line and "\n" not in line, (layout, name, line)
        assert ("on rank 0;" if world == 2 else "on ranks 0-2") in line, (layout, name, line)


@pytest.mark.parametrize(
    "layout, world", [("fsdp2", 3), ("fsdp1", 2), ("ddp", 3), ("tp", 2), ("tp+fsdp2", 4), ("hsdp", 4)]
)
@pytest.mark.parametrize("optimizer", ["LoRAPre", "LoRAPreMuon"])
def test_a_gradient_that_one_rank_lacks_is_zero_there(layout, world, optimizer):
    """And one that all lack leaves the parameter as it is, as in torch.optim, without a further collective."""
    for same, still, asked in run_ranks(world, lacking_case, layout=layout, optimizer=optimizer):
        assert same and still and asked == (2 if layout == "tp+fsdp2" else 1)
