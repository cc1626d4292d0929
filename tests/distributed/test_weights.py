"""16-bit weights under PyTorch's layouts: the same bits under each, and every bit saved and loaded."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist.state.full import recoded

from .harness import run_ranks
from .weights_cases import bits_case, built, digest, given_gradients, moments_case, relay_case

LAYOUTS = {
    2: ["fsdp1", "fsdp2", "ddp", "tp"],
    3: ["fsdp1", "fsdp2", "ddp replicated", "tp"],
    4: ["fsdp1 hybrid", "fsdp2", "ddp", "hsdp"],
}
RELAYS = {
    "ours": [("tp", 3), ("fsdp1", 3), ("tp+fsdp2", 4), ("ddp", 2), ("fsdp2", 3)],
    "dcp": [("ddp", 1), ("fsdp2", 2), ("ddp", 3), ("hsdp", 4), ("tp+fsdp2", 4), ("tp", 3)],
    "dcp, FSDP1": [("fsdp1", 2), ("fsdp1", 3)],
    "full": [("tp+fsdp2", 4), ("ddp", 3), ("fsdp2", 3)],
    "flat": [("fsdp2", 3), ("ddp", 2)],
    "plain": [("fsdp1", 3)] * 2,
}


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
def test_every_layout_gives_the_same_bits(weights):
    """Of weights under LoRAPreLion and under AdamW; whatever the shards, also such as begin in the middle of a row."""
    steps = 4
    model, optimizer = built("one device", 1, "LoRAPreLion", weights)
    for step in range(steps):
        given_gradients(model, optimizer, step)
        optimizer.step()
    want = {name: digest(p.detach()) for name, p in model.named_parameters()}
    for world, layouts in LAYOUTS.items():
        for found in run_ranks(world, bits_case, layouts=layouts, weights=weights, steps=steps):
            for layout, got in found.items():
                assert got == want, (world, layout)


@pytest.mark.parametrize("relay", RELAYS)
def test_what_is_kept_goes_on_in_another_layout(relay, tmp_path):
    """Every bit of weights and state of ``kahan``, compensation among it."""
    before = None
    for leg, (layout, world) in enumerate(RELAYS[relay]):
        arguments = {"layout": layout, "how": relay.split(",")[0], "folder": str(tmp_path), "leg": leg}
        results = run_ranks(world, relay_case, weights="kahan", **arguments)
        if before is not None:
            assert results[0]["loaded"] == before, (leg, layout, world)
        assert sum(key.endswith("/compensation") for key in results[0]["left"]) == 17
        before = results[0]["left"]


@pytest.mark.parametrize("layout, world", [("fsdp2", 2), ("ddp", 2), ("tp", 3)])
def test_masters_and_halves_become_each_other(layout, world, tmp_path):
    """fp32 weights, as bf16 with compensation, and as fp32 again: the same numbers, and it is said."""
    relay = [("master", "fsdp1", 2), ("kahan", layout, world), ("master", layout, world), ("stochastic", "ddp", 2)]
    said = []
    for leg, (weights, where, ranks) in enumerate(relay):
        arguments = {"layout": where, "how": "ours", "folder": str(tmp_path), "leg": leg}
        results = run_ranks(ranks, relay_case, weights=weights, **arguments)
        said += [results[0].get("said")]
    assert said[0] is None and said[3] == []
    assert "have a compensation here that was not saved" in said[1][0]
    assert "is not kept here: fp32 weights take it in" in said[2][0]


def test_adamws_moments_change_their_form_in_any_layout(tmp_path):
    """Saved in fp32 and loaded in 8 bits, and back: what converting the whole matrix gives, bit for bit."""
    relay = [("adamw", "fsdp1", 3), ("adamw8bit", "tp+fsdp2", 4), ("adamw", "ddp", 2), ("adamw8bit", "fsdp2", 3)]
    before = None
    for leg, (other_state, layout, world) in enumerate(relay):
        arguments = {"layout": layout, "other_state": other_state, "folder": str(tmp_path), "leg": leg}
        first, *_ = run_ranks(world, moments_case, **arguments)
        for name, entry in (before or {}).items():
            found, want = first["loaded"][name], entry
            if torch.as_tensor(entry.get("exp_avg", entry.get("exp_avg_8bit", 0.0))).ndim == 2:
                want = recoded(entry, other_state == "adamw8bit")
                assert want.keys() != entry.keys()
            assert found.keys() == want.keys()
            assert all(torch.equal(torch.as_tensor(found[k]), torch.as_tensor(want[k])) for k in want), (leg, name)
        before = first["left"]
