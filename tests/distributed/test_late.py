"""Parameters that are frozen for a while, or come late, are stepped as in torch.optim; copies are copies."""

from __future__ import annotations

import pytest

from .harness import run_ranks
from .late_cases import copied_case, late_case, resumed_case, wrapped_late_case

LAYOUTS = [("one device", 1), ("fsdp2", 2), ("ddp", 2), ("ddp replicated", 2), ("tp+fsdp2", 4)]


@pytest.mark.parametrize("layout, world", LAYOUTS)
def test_frozen_parameters_and_groups_that_come_later(layout, world):
    """fp64, so that rounding alone leaves 1e-15."""
    for error in run_ranks(world, late_case, layout=layout):
        assert error <= 1e-10


@pytest.mark.parametrize("how", ["plain", "checkpoint", "full"])
@pytest.mark.parametrize("layout, world", LAYOUTS[:3])
def test_state_of_what_is_frozen_now_is_kept(layout, world, how, tmp_path):
    for error in run_ranks(world, resumed_case, layout=layout, how=how, folder=str(tmp_path), then=False):
        assert error <= 1e-10


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
@pytest.mark.parametrize("layout, world", LAYOUTS[:3])
def test_what_was_frozen_when_it_was_saved_begins_with_fresh_state(layout, world, how, tmp_path):
    for error in run_ranks(world, resumed_case, layout=layout, how=how, folder=str(tmp_path), then=True):
        assert error <= 1e-10


@pytest.mark.parametrize("layout, world", [("fsdp2", 2), ("ddp", 2), ("tp", 2)])
def test_a_deep_copy_is_a_state_of_its_own(layout, world):
    assert run_ranks(world, copied_case, layout=layout) == [(True, True)] * world


def test_parameters_that_come_under_another_layout_are_refused():
    for text in run_ranks(2, wrapped_late_case):
        assert "came later lie under DDP, sharded state, those before under one device" in text
