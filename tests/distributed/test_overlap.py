"""``overlap``: the same bits, at most one delay that is felt, no look at the state that does not wait."""

from __future__ import annotations

import pytest

from lorapre_dist.optimizers import OPTIMIZERS

from .harness import run_ranks
from .overlap_cases import bits_case, doors_case, failing_case, felt_case, memory_case

PAPER = {"variant": "paper", "damping": 1e-3}


BOTH = ["LoRAPre", "LoRAPreMuon"]


@pytest.mark.parametrize(
    "layout, world, options, bucket, few",
    [
        ("fsdp2", 3, {}, None, list(OPTIMIZERS)),
        ("fsdp2", 3, PAPER, 2000, BOTH),
        ("fsdp1", 3, {}, 2000, BOTH),
        ("hsdp", 4, {}, None, ["LoRAPreMuon"]),
        ("tp", 3, {}, 2000, ["LoRAPre"]),
        ("tp+fsdp2", 4, {}, 2000, ["LoRAPreMuon"]),
        ("pp+fsdp2", 4, {}, 2000, ["LoRAPre"]),
        ("ep+fsdp2 2", 4, {}, None, ["LoRAPreMuon"]),
        ("ddp", 2, {}, None, BOTH),
        ("ddp replicated", 2, {}, None, ["LoRAPre"]),
    ],
)
def test_the_same_bits(layout, world, options, bucket, few, exhaustive):
    """Of weights and state; a bucket of 2,000 bytes makes many waves."""
    optimizers = few
    if exhaustive:
        optimizers = list(OPTIMIZERS) if layout == "fsdp2" else BOTH
    if options.get("variant") == "paper":
        optimizers = [name for name in optimizers if name != "LoRAPreAdafactor"]
    arguments = {"layout": layout, "optimizers": optimizers, "options": options, "bucket": bucket}
    for result in run_ranks(world, bits_case, timeout=400, **arguments):
        assert result == {name: [] for name in optimizers}


@pytest.mark.parametrize(
    "layout, optimizer, most",
    [
        ("fsdp2", "LoRAPre", 1),
        ("fsdp2", "LoRAPreAdafactor", 2),  # sums over columns
        ("fsdp2", "LoRAPreLion", 1),
        ("fsdp1", "LoRAPre", 2),  # rows that are cut between ranks
        ("ddp", "LoRAPre", 2),  # the weights' own broadcast
    ],
)
def test_delays_that_are_felt(layout, optimizer, most):
    """By the order of events, on a clock that only waits move on: whether all is finite, and what is stated above."""
    for result in run_ranks(2, felt_case, layout=layout, optimizer=optimizer, overlap=True):
        assert 1 <= result["felt"] <= most, result
        assert result["after"] == 0
    for result in run_ranks(2, felt_case, layout=layout, optimizer=optimizer, overlap=False):
        assert result["felt"] >= most + (0 if layout.startswith("ddp") else 5), result


def test_every_look_at_the_state_waits():
    for result in run_ranks(2, doors_case):
        assert all(result.values()), result


def test_what_goes_wrong_is_said_at_the_next_look():
    for said in run_ranks(2, failing_case):
        assert len(said) == 4 and all("Connection closed by peer" in text for text in said)


@pytest.mark.parametrize("layout, options", [("fsdp2", {}), ("fsdp1", PAPER), ("tp", {})])
def test_memory_is_stated_and_can_be_refused(layout, options):
    for result in run_ranks(3, memory_case, layout=layout, options=options):
        assert result["stated"] > 0 and result["kept"] <= result["stated"]
        assert result["kept"] > 0
        assert "kept by overlap" in result["text"]
        assert len(result["said"]) == 2 and all("overlap_limit=100" in text for text in result["said"])
