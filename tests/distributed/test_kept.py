"""Factors in other forms, and gradients that are released, give the same under every layout."""

from __future__ import annotations

import functools

import pytest
import torch

from lorapre_dist.core.spec import CODES, SCALES
from lorapre_dist.optimizers import OPTIMIZERS
from tests.covering import some

from .harness import run_ranks
from .kept_cases import accumulation_case, fsdp2_accumulation_case, killed_case, trained_case
from .native_cases import OPTIONS, Net, batch_of

LAYOUTS = [("fsdp2", 3), ("fsdp1", 3), ("ddp", 2), ("tp", 2), ("tp+fsdp2", 4)]
STEPS = 6


@functools.cache
def alone(optimizer, **options):
    """On one device."""
    return trained_case(0, 1, layout=None, steps=STEPS, options=options, optimizer=optimizer)


def assert_parameters_match(result, want, tolerance=1e-10):
    for name, p in want["parameters"].items():
        error = float((result["parameters"][name] - p).norm() / p.norm())
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize(
    "layout, world, form",
    some([(*where, form) for where in LAYOUTS for form in ("bf16", "8bit")], [(*where, "8bit") for where in LAYOUTS]),
)
def test_factors_in_other_forms_have_the_same_bits_under_every_layout(layout, world, form):
    """Sums differ in fp64 by their order, 1e-15 of them, and what is rounded are fp32 numbers: a bit in 1e7 may."""
    options = {"state_dtype": form, "rank": 3}
    want = alone("LoRAPre", **options)
    first, *others = run_ranks(world, trained_case, layout=layout, steps=STEPS, options=options)
    for result in (first, *others):
        assert_parameters_match(result, want)
    for name, entry in want["state"].items():
        for key, tensor in entry.items():
            if key.endswith(("_A", "_B")):
                assert tensor.dtype == {"bf16": torch.bfloat16, "8bit": torch.int8}[form]
                assert torch.equal(first["state"][name][key], tensor), (name, key)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "LoRAPre"])
def test_other_optimizers_in_8_bits(optimizer):
    options = {"state_dtype": "8bit", "rank": 3}
    for result in run_ranks(3, trained_case, layout="fsdp2", steps=STEPS, options=options, optimizer=optimizer):
        assert_parameters_match(result, alone(optimizer, **options))


@pytest.mark.parametrize("layout, world", [("fsdp2", 3), ("fsdp1", 3), ("ddp", 2), ("tp+fsdp2", 4)])
def test_adafactors_sums_are_those_of_one_device(layout, world):
    options = {"rank": 3, "target_modules": ["q_proj", "experts"], "other_state": "adafactor"}
    want = alone("LoRAPre", rank=3, target_modules=("q_proj", "experts"), other_state="adafactor")
    first, *others = run_ranks(world, trained_case, layout=layout, steps=STEPS, options=options)
    for result in (first, *others):
        assert_parameters_match(result, want)
    for name, entry in want["state"].items():
        assert first["state"][name].keys() == entry.keys()
        for key in entry.keys() & {"rms_row", "rms_col"}:
            assert torch.allclose(first["state"][name][key], entry[key], rtol=1e-10), (name, key)


@pytest.mark.parametrize("layout, world", LAYOUTS)
def test_adamw_in_8_bits_has_the_same_bits_under_every_layout(layout, world):
    """Of rows in the middle of which ranks begin as well; what is rounded differs in fp64, by the order of sums."""
    options = {"rank": 3, "other_state": "adamw8bit"}
    want = alone("LoRAPre", **options, target_modules=("q_proj", "experts"))
    options["target_modules"] = ["q_proj", "experts"]
    first, *others = run_ranks(world, trained_case, layout=layout, steps=STEPS, options=options)
    for result in (first, *others):
        assert_parameters_match(result, want)
    coded = {name for name, entry in want["state"].items() if "exp_avg_row" in entry}
    assert len(coded) >= 3
    for name in coded:
        entry, found = want["state"][name], first["state"][name]
        assert found.keys() == entry.keys()
        for scale, key in SCALES.items():
            assert entry[key].dtype == getattr(torch, CODES[key]) and torch.equal(found[key], entry[key]), (name, key)
            assert torch.allclose(found[scale], entry[scale], rtol=1e-10), (name, key)


@pytest.mark.parametrize(
    "layout, world, views",
    [("fsdp2", 3, False), ("hsdp", 4, False), ("ddp", 2, False), ("ddp", 3, True), ("tp", 2, False)],
)
def test_released_gradients_train_as_kept_ones(layout, world, views):
    """Nearly everything is stepped before the backward pass is over, and no gradient is left."""
    want = alone("LoRAPre", rank=3)
    arguments = {"steps": STEPS, "options": {"rank": 3, "release_gradients": True}, "bucket": 1, "views": views}
    for result in run_ranks(world, trained_case, layout=layout, **arguments):
        assert_parameters_match(result, want)
        assert result["kept"] == []
        missing = want["parameters"].keys() - result["early"]
        # Shards without elements are not seen to change.
        assert not missing if layout != "fsdp2" else len(missing) < len(want["parameters"]) / 2


def test_released_gradients_of_muon_in_few_batches():
    want = alone("LoRAPreMuon", rank=3)
    arguments = {"steps": STEPS, "options": {"rank": 3, "release_gradients": True}, "optimizer": "LoRAPreMuon"}
    for bucket in (1, 4000):
        for result in run_ranks(2, trained_case, layout="fsdp2", bucket=bucket, **arguments):
            assert_parameters_match(result, want)


@pytest.mark.parametrize("layout, world", [("fsdp2", 2), ("ddp", 2)])
def test_what_one_rank_cannot_use_no_rank_does(layout, world):
    arguments = {"steps": 4, "options": {"rank": 3, "release_gradients": True}, "bucket": 1, "poisoned": 1}
    results = run_ranks(world, trained_case, layout=layout, **arguments)
    for result in results:
        assert result["skipped"] == 1
        assert all(p.isfinite().all() for p in result["parameters"].values())
        assert_parameters_match(result, results[0], 0.0)


def test_what_cannot_be_released_is_said():
    for said in run_ranks(2, accumulation_case):
        twice, unused, fsdp1 = said
        assert "came twice before optimizer.step()" in twice
        assert "find_unused_parameters=True) is not supported" in unused
        assert "use FSDP2" in fsdp1


def test_fsdp2_accumulates_before_it_reduces():
    model = Net(torch.float64)
    optimizer = OPTIMIZERS["LoRAPre"](model.named_parameters(), **OPTIONS["LoRAPre"])
    for step in range(3):
        optimizer.zero_grad()
        for half in range(2):
            model(batch_of(2 * step + half, torch.float64)).backward()
        optimizer.step()
    want = {"parameters": {n: p.detach() for n, p in model.named_parameters()}}
    for result in run_ranks(2, fsdp2_accumulation_case):
        assert_parameters_match({"parameters": result}, want)


@pytest.mark.parametrize("layout", ["fsdp2", "tp"])
def test_a_backward_pass_that_is_killed_on_all_ranks_resumes_to_the_same_bits(layout, tmp_path):
    for early, differing in run_ranks(2, killed_case, layout=layout, folder=str(tmp_path)):
        assert any("k_proj" in name for name in early) and not any("q_proj" in name for name in early)
        assert not differing
