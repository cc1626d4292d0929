"""State goes on from layout to layout, and through torch's own functions."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist.core.sizes import SAMPLES
from tests.covering import some

from .harness import run_ranks
from .state_cases import STEPS, columns_case, dense_path, fresh_case, refusal_case, relay_case, whole_case

RELAYS = {
    "ours": ("LoRAPreMuon", [("tp", 3), ("fsdp1", 3), ("tp+fsdp2", 4), ("ddp", 2), ("tp", 2)]),
    "dcp": ("LoRAPre", [("ddp", 1), ("fsdp2", 2), ("ddp", 3), ("hsdp", 4), ("fsdp2", 3), ("tp+fsdp2", 4), ("tp", 3)]),
    "dcp, experts": ("LoRAPreAdafactor", [("ep+fsdp2 0", 4), ("ep+fsdp2 2", 4), ("fsdp2", 3), ("ep+fsdp2 1", 4)]),
    "ours, stages": ("LoRAPreMuon", [("pp+fsdp2", 4), ("ep+fsdp2 2", 4)]),
    "ours, stages of parts": ("LoRAPreMuon", [("tp+pp+fsdp2", 8), ("pp+fsdp2", 4)]),
    "flat, stages": ("LoRAPreMuon", [("pp+fsdp2", 4)] * 2),
    "dcp, FSDP1": ("LoRAPreAdafactor", [("fsdp1", 2), ("fsdp1", 3), ("fsdp1 hybrid", 4)]),
    "full": ("LoRAPreAdafactor", [("tp+fsdp2", 4), ("ddp", 3), ("fsdp2", 3), ("ddp replicated", 2)]),
    "flat": ("LoRAPreAdafactor", [("fsdp2", 3), ("ddp", 2), ("tp+fsdp2", 4)]),
    "plain, FSDP2": ("LoRAPre", [("tp+fsdp2", 4)] * 2),
    "plain, FSDP1": ("LoRAPre", [("fsdp1", 3)] * 2),
    "plain, DDP": ("LoRAPre", [("ddp", 2)] * 2),
}

SOLVES = {"reduce Gram of B", "send inverse of B", "reduce Gram of A", "send gauge"}


@pytest.mark.parametrize("relay", some(RELAYS, [name for name in RELAYS if name != "ours, stages of parts"]))
def test_training_goes_on_in_another_layout(relay, tmp_path):
    """fp64, so that what is lost or misplaced on the way shows: rounding alone leaves 1e-15."""
    optimizer, legs = RELAYS[relay]
    torch.save(dense_path(optimizer, STEPS * len(legs)), tmp_path / "reference.pt")
    for leg, (layout, world) in enumerate(legs):
        arguments = {"layout": layout, "how": relay.split(",")[0], "folder": str(tmp_path), "leg": leg}
        for error, name in run_ranks(world, relay_case, optimizer=optimizer, **arguments):
            assert error <= 1e-10, (leg, layout, world, name, error)


@pytest.mark.parametrize(
    "layout, options, words",
    [
        ("fsdp1", {"full_state_dict": True}, "torch's full_state_dict or async_save: use optimizer.full_state_dict()"),
        ("ddp", {"full_state_dict": True, "broadcast_from_rank0": True}, "with broadcast_from_rank0: give every rank"),
    ],
)
def test_what_a_layout_cannot_do_is_refused(layout, options, words):
    for said in run_ranks(2, refusal_case, layout=layout, options=options):
        assert words in said


def test_asking_for_a_fresh_state_takes_no_step(tmp_path):
    """Torch would take one with zero gradients if it found no state."""
    for same, steps, said in run_ranks(2, fresh_case, folder=str(tmp_path)):
        assert same and steps == 0
        assert "was split otherwise: torch.distributed.checkpoint would reshard it" in said


def test_a_full_state_is_loaded_under_any_layout(tmp_path):
    """Also where torch cannot cut it: uneven rows under tensor parallelism and FSDP2."""
    path = str(tmp_path / "full.pt")
    want = run_ranks(2, whole_case, layout="ddp", path=path, train_first=True)[0]
    for layout, world in (("tp+fsdp2", 4), ("fsdp2", 3)):
        for got in run_ranks(world, whole_case, layout=layout, path=path, train_first=False):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[key], want[key]) for key in want)


def test_tensor_parallel_columns_need_no_other_ranks_columns():
    """All matrices split by columns: of what is gathered elsewhere the matrices' sizes alone are."""
    for calls, sent in run_ranks(2, columns_case):
        assert set(calls) == {"finite", "gather A", "gather B", "edge rows", *SOLVES}
        assert sent["gather B"] == 2 * 4 * (12 // 2) * (
            3 + 1 + 1
        )  # half of the rows of both factors and the statistics
        assert sent["gather A"] == 2 * 4 * (SAMPLES + 3)
