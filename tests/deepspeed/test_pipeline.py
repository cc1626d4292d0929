"""DeepSpeed's pipeline: every number of stages gives the dense reference's parameters."""

from __future__ import annotations

import pytest

from tests.covering import some
from tests.distributed.harness import run_ranks

from . import checkpoint_cases
from .cases import OTHER_PARAMS
from .pipeline_cases import equality_case, refused_case, skipping_case, state_case, visit_case

FP32 = 1e-5  # the contract: fp32 summation order is all that differs
COMBOS = [(1, 0.0), (4, 0.5)]  # (gradient accumulation, clipping)


# What DeepSpeed makes of bf16 in a pipeline under ZeRO-0 clips gradients in bf16, as nothing else does.
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES = [
    (2, 2, 0, "fp32", COMBOS, {}, "ZeRO-0"),
    (4, 4, 0, "fp32", COMBOS[1:], {}, "ZeRO-0"),
    (4, 2, 0, "fp32", COMBOS[1:], {}, "ZeRO-0"),
    (4, 2, 1, "fp32", COMBOS, {}, "ZeRO-1"),
    (4, 2, 1, "bf16", COMBOS[1:], {}, "ZeRO-1"),
    (4, 2, 1, "bf16", COMBOS[1:], FP32_GRADIENTS, "ZeRO-1 (bf16)"),
    (2, 2, 0, "bf16", COMBOS[:1], {}, "ZeRO-1 (bf16)"),
]


@pytest.mark.parametrize("world, stages, stage, precision, combos, changes, layout", CASES)
def test_stages_match_reference(world, stages, stage, precision, combos, changes, layout, steps):
    arguments = {"stages": stages, "stage": stage, "precision": precision, "changes": changes, "steps": steps}
    for result in run_ranks(world, equality_case, combos=combos, **arguments):
        for combo in result:
            assert combo["error"] <= FP32 and combo["layout"] == layout, combo


@pytest.mark.parametrize("optimizer", some(OTHER_PARAMS, ["LoRAPreLion", "LoRAPreAdafactor"]))
def test_other_optimizers_match_reference(optimizer, steps):
    arguments = {"stages": 2, "stage": 1, "precision": "fp32", "combos": COMBOS[1:], "steps": steps}
    for result in run_ranks(4, equality_case, optimizer=optimizer, **arguments):
        assert result[0]["error"] <= FP32, result


# (ranks, stages or None: no pipeline, ZeRO stage)
WALK = [(4, 2, 1), (3, None, 3), (2, 2, 0), (4, 4, 0), (2, None, 2), (4, 2, 1), (2, 1, 1), (1, None, 0), (2, 2, 0)]


@pytest.mark.parametrize("optimizer", some(["LoRAPre", "LoRAPreAdafactor"], ["LoRAPreAdafactor"]))
def test_resume_with_other_stages_and_without_a_pipeline(tmp_path, optimizer):
    """Saved and loaded on the way, the run ends where the reference does that never stopped."""
    checkpoint_cases.write_reference(str(tmp_path), len(WALK), optimizer)
    for step, (world, stages, stage) in enumerate(WALK):
        arguments = {"stage": stage, "folder": str(tmp_path), "step": step, "optimizer": optimizer}
        if stages is None:
            results = run_ranks(world, checkpoint_cases.visit_case, precision="fp32", **arguments)
        else:
            results = run_ranks(world, visit_case, stages=stages, **arguments)
        for error, name in results:
            assert error <= FP32, (step, name)


def test_the_whole_state_is_that_of_all_stages(tmp_path):
    results = run_ranks(4, state_case, folder=str(tmp_path))
    first, second = results[0]
    assert first.keys() == second.keys() and len(first) == 10
    for name, entry in first.items():
        assert entry.keys() == second[name].keys() and entry["step"] == 3
        for key, value in entry.items():
            assert key == "step" or value.equal(second[name][key]), (name, key)


@pytest.mark.parametrize("stage", [0, 1])
def test_no_stage_takes_a_step_that_is_not_finite_on_another(stage):
    assert run_ranks(4, skipping_case, stage=stage) == [(1, True)] * 4


def test_refusals_are_one_clear_line():
    words = [
        "'12': must begin",
        "'head': must begin",
        "would both be called 'model.weight'",
        "'1': must begin",
        "'bias'",
    ]
    for said in run_ranks(2, refused_case):
        assert len(said) == len(words)
        for text, word in zip(said, words, strict=True):
            assert word in text and "\n" not in text
