"""``work="matrices"``: what one of the ranks does with a whole matrix is what all do by rows."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist import LoRAPre
from lorapre_dist.config import ConfigError
from tests.covering import covering

from .harness import run_ranks
from .native_cases import OPTIONS, Net, equality_case
from .whole_cases import MATRICES, bits_case, memory_case, nothing_case, resumed_case, skip_case, turns_case

LAYOUTS = [
    ("fsdp2", 3),
    ("hsdp", 4),
    ("fsdp1", 3),
    ("tp", 3),
    ("tp+fsdp2", 4),
    ("pp+fsdp2", 4),
    ("cp+fsdp2", 4),
    *[(f"ep+fsdp2 {dim}", 4) for dim in (0, 1, 2)],
    ("ddp", 2),
]


@pytest.mark.parametrize("where, optimizer", covering(LAYOUTS, OPTIONS, strength=1))
def test_parameters_match_reference_in_fp64(where, optimizer, steps):
    layout, world = where
    arguments = {"layout": layout, "dtype": torch.float64, "steps": steps, "optimizer": optimizer, "options": MATRICES}
    for result in run_ranks(world, equality_case, **arguments):
        assert result["error"] <= 1e-10, (result["name"], result["error"])


KEPT = [
    {},
    {"variant": "paper", "damping": 1e-3},
    {"state_dtype": "bf16"},
    {"state_dtype": "8bit"},
    {"weights": "kahan"},
    {"weights": "stochastic", "state_dtype": "8bit"},
]


@pytest.mark.parametrize("layout, options", covering(["fsdp2", "fsdp1", "tp"], KEPT, strength=1))
@pytest.mark.parametrize("bucket", [None, 2000])  # bytes: of many rounds
def test_the_state_has_the_bits_of_one_process(layout, options, bucket):
    """Given the same gradients; the change is added to weights, so that they differ by a rounding in every step."""
    arguments = {"layout": layout, "optimizer": "LoRAPre", "options": options, "bucket": bucket, "steps": 4}
    for differing, far in run_ranks(3, bits_case, **arguments):
        assert differing == [] and far <= (2**-7 if "weights" in options else 1e-6), (differing, far)


@pytest.mark.parametrize("optimizer", [name for name in OPTIONS if name != "LoRAPre"])
def test_so_it_has_of_the_other_optimizers(optimizer):
    arguments = {"layout": "fsdp2", "optimizer": optimizer, "options": {}, "bucket": None, "steps": 4}
    for differing, far in run_ranks(3, bits_case, **arguments):
        assert differing == [] and far <= 1e-6


@pytest.mark.parametrize(
    "layout, optimizer", [("fsdp2", "LoRAPre"), ("tp", "LoRAPreMuon"), ("fsdp1", "LoRAPreAdafactor")]
)
def test_rows_and_matrices_in_turns(layout, optimizer):
    """The state lies as it does: a run goes on either way."""
    assert max(run_ranks(3, turns_case, layout=layout, optimizer=optimizer, steps=6)) <= 1e-10


def test_a_checkpoint_of_rows_goes_on_by_matrices(tmp_path):
    for calls in run_ranks(3, resumed_case, folder=str(tmp_path)):
        assert calls == {"finite", "gather matrices", "return matrices"}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("layout, optimizer", covering(["fsdp2", "fsdp1"], OPTIONS, strength=1))
def test_a_step_that_is_not_finite_changes_nothing(layout, optimizer, on_device):
    for changed in run_ranks(3, skip_case, layout=layout, optimizer=optimizer, on_device=on_device):
        assert changed == []


@pytest.mark.parametrize("optimizer, bucket", covering(OPTIONS, [2000, 1 << 20], strength=1))
def test_the_workspace_is_bounded(optimizer, bucket):
    for held, bound in run_ranks(3, memory_case, optimizer=optimizer, bucket=bucket):
        assert 0 < held <= bound


def test_a_rank_without_a_part_knows_what_the_others_send():
    assert run_ranks(3, nothing_case) == [2] * 3


def test_bad_options():
    with pytest.raises(ConfigError, match="work='columns'"):
        LoRAPre(Net().named_parameters(), rank=2, work="columns")
    with pytest.raises(ConfigError, match="overlap=true with work='matrices'"):
        LoRAPre(Net().named_parameters(), rank=2, work="matrices", overlap=True)


def test_on_one_device_it_is_as_it_was():
    found = []
    for work in ("rows", "matrices"):
        model = Net()
        optimizer = LoRAPre(model.named_parameters(), rank=2, work=work)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("layout", ["fsdp2", "tp"])
def test_gradients_that_are_released(layout):
    """Each batch of them has owners of its own, who begin with another rank."""
    options = {**MATRICES, "release_gradients": True}
    arguments = {"layout": layout, "dtype": torch.float64, "steps": 6, "optimizer": "LoRAPre", "options": options}
    for result in run_ranks(3, equality_case, **arguments):
        assert result["error"] <= 1e-10, (result["name"], result["error"])
