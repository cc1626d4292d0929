"""bf16 weights without fp32 masters under DeepSpeed: the same bits as under PyTorch, through checkpoints too."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks

from .weights_cases import ENGINES, bits_case, visit_case

NATIVE = ["fsdp2", "ddp"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
def test_every_stage_and_layout_gives_the_same_bits(weights, exhaustive):
    """Of every weight after five steps; where the fp32 numbers are the same, so are those that they are rounded to."""
    seen: dict[str, set[str]] = {}
    worlds = {1: ["zero2", "fsdp2", "ddp"], 2: [*ENGINES, *NATIVE], 3: ["zero1", "zero2", "zero3", *NATIVE]}
    if exhaustive:
        worlds = {world: [*ENGINES, *NATIVE] for world in (1, 2, 3, 4)}
    for world, layouts in worlds.items():
        arguments = {"layouts": layouts, "optimizer": "LoRAPreLion", "weights": weights, "steps": 5}
        for found in run_ranks(world, bits_case, timeout=400, **arguments):
            for digests in found.values():
                for name, value in digests.items():
                    seen.setdefault(name, set()).add(value)
    assert len(seen) == 9
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(seen, 1)


def test_a_run_goes_on_with_the_same_bits_in_another_layout(tmp_path):
    """With compensation from layout to layout, and on the way as fp32 masters, which lose nothing of it."""
    walk = [
        ("zero2", 2, "kahan"),
        ("zero3", 3, "kahan"),
        ("fsdp2", 2, "kahan"),
        ("zero2", 2, "master"),
        ("zero1 offload", 2, "kahan"),
        ("ddp", 3, "kahan"),
        ("zero3 offload", 2, "kahan"),
    ]
    said = []
    for leg, (layout, world, weights) in enumerate(walk):
        arguments = {"layout": layout, "weights": weights, "folder": str(tmp_path), "leg": leg}
        results = run_ranks(world, visit_case, **arguments)
        digests, words = results[0]
        said.append(words)
        assert all(found == digests for found, _ in results)
    whole = run_ranks(2, bits_case, layouts=["ddp"], optimizer="LoRAPreLion", weights="kahan", steps=2 * len(walk))
    assert digests == whole[0]["ddp"]
    assert [len(words) for words in said] == [0, 0, 0, 1, 1, 0, 0]
    assert "fp32 weights take it in" in said[3][0] and "that was not saved" in said[4][0]


def test_random_bits_go_on_where_they_were(tmp_path):
    walk = [("zero1", 2), ("zero3", 3), ("ddp", 2)]
    for leg, (layout, world) in enumerate(walk):
        arguments = {"layout": layout, "weights": "stochastic", "folder": str(tmp_path), "leg": leg}
        digests, _ = run_ranks(world, visit_case, **arguments)[0]
    whole = run_ranks(2, bits_case, layouts=["zero2"], optimizer="LoRAPreLion", weights="stochastic", steps=6)
    assert digests == whole[0]["zero2"]
