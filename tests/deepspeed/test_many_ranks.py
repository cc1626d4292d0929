"""More ranks than a matrix has rows: real processes, 16 of them, and 64 with ``--exhaustive``.

At so many a rank holds a part of a row, or nothing of a matrix; a matrix lies on up to all of them; most Grams belong
to others.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed import native_cases
from tests.distributed.harness import close_pools, run_ranks

from .cases import equality_case
from .checkpoint_cases import native_visit_case, visit_case, write_reference
from .non_finite_cases import overlap_case, skip_case
from .test_non_finite import check

TIMEOUT = 400
ZERO = [(1, "LoRAPre"), (1, "LoRAPreAdafactor"), (2, "LoRAPreMuon"), (2, "LoRAPreLion"), (3, "LoRAPreSGD")]
NATIVE = [
    ("fsdp2", "LoRAPre"),
    ("hsdp", "LoRAPreMuon"),
    ("fsdp1", "LoRAPreSGD"),
    ("ddp", "LoRAPreLion"),
    ("tp", "LoRAPreAdafactor"),
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[16, pytest.param(64, marks=pytest.mark.exhaustive)])
def world(request):
    """How many ranks; they end with the last test of so many."""
    yield request.param
    close_pools()


@pytest.mark.parametrize("stage, optimizer", ZERO)
def test_zero_matches_the_reference(world, stage, optimizer):
    arguments = {"stage": stage, "precision": "fp32", "steps": 3, "combos": [(1, 0.5)], "optimizer": optimizer}
    for result in run_ranks(world, equality_case, TIMEOUT, **arguments):
        assert max(combo["error"] for combo in result) <= 1e-5


@pytest.mark.parametrize("layout, optimizer", NATIVE)
def test_layouts_without_deepspeed_match_the_reference_in_fp64(world, layout, optimizer):
    arguments = {"layout": layout, "dtype": torch.float64, "steps": 3, "optimizer": optimizer}
    for result in run_ranks(world, native_cases.equality_case, TIMEOUT, **arguments):
        assert result["error"] <= 1e-10, (result["name"], result["error"])


@pytest.mark.parametrize("layout, optimizer", [("fsdp2", "LoRAPreMuon"), (3, "LoRAPre")])
def test_steps_by_matrices_match_the_reference(world, layout, optimizer):
    options = {"work": "matrices"}
    if layout == "fsdp2":
        arguments = {"layout": layout, "dtype": torch.float64, "steps": 3, "optimizer": optimizer, "options": options}
        for result in run_ranks(world, native_cases.equality_case, TIMEOUT, **arguments):
            assert result["error"] <= 1e-10, (result["name"], result["error"])
    else:
        arguments = {"stage": layout, "precision": "fp32", "steps": 3, "combos": [(1, 0.5)], "params": options}
        for result in run_ranks(world, equality_case, TIMEOUT, optimizer=optimizer, **arguments):
            assert max(combo["error"] for combo in result) <= 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_overlap_gives_the_same_bits(world, stage):
    for result in run_ranks(world, overlap_case, TIMEOUT, stage=stage, optimizers=["LoRAPre"], folder=None):
        assert result == {"LoRAPre": []}


def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(world):
    check(run_ranks(world, skip_case, TIMEOUT, stage=2, precision="fp32", value=float("nan")))


def test_a_few_ranks_go_on_where_many_have_been_and_back(world, tmp_path):
    path = [(2, world), (3, 2), (3, world), ("fsdp2", world), (1, 3), (1, world), ("ddp", 2), (0, world)]
    write_reference(str(tmp_path), len(path))
    for step, (layout, ranks) in enumerate(path):
        arguments = {"folder": str(tmp_path), "step": step}
        if isinstance(layout, int):
            results = run_ranks(ranks, visit_case, TIMEOUT, stage=layout, precision="fp32", **arguments)
        else:
            results = run_ranks(ranks, native_visit_case, TIMEOUT, layout=layout, **arguments)
        assert max(error for error, _ in results) <= 1e-5, (layout, ranks)
