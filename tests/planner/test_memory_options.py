"""Options that save memory, activations, and the moment of the peak in a plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lorapre_dist.cli import main
from lorapre_dist.config import ConfigError, LoRAPreConfig
from lorapre_dist.planner import Parameter, Request, plan
from lorapre_dist.planner.fitting import mildest
from lorapre_dist.planner.models import load

TOY = tuple(
    Parameter(f"layers.{k}.{name}.weight", shape)
    for k in range(2)
    for name, shape in {"q_proj": (24, 24), "up_proj": (40, 24), "down_proj": (24, 40), "norm": (24,)}.items()
)


def usage_of(layout="ddp", model="llama-60m", world=1, rank=64, *, run=None, **options):
    request = Request("m", load(model), layout, world, optimizer=LoRAPreConfig(rank=rank, **options), **(run or {}))
    return plan(request, ("LoRAPre",))["LoRAPre"]


@pytest.mark.parametrize("layout, world", [("ddp", 1), ("fsdp2", 4), ("zero2", 4), ("zero3", 4)])
def test_weights_of_16_bits_have_no_masters(layout, world):
    """Two bytes less an element that is stepped, and its gradient's; kahan keeps two beside it, as state."""
    masters, stochastic, kahan = (usage_of(layout, world=world, weights=w) for w in (None, "stochastic", "kahan"))
    elements = sum(p.numel for p in load("llama-60m"))
    own = elements if layout == "ddp" else -(-elements // world)
    saved = masters.memory["weights"] - stochastic.memory["weights"]
    assert 2 * own <= saved[0] <= 2.01 * own
    assert kahan.memory["weights"].tolist() == stochastic.memory["weights"].tolist()
    assert int((kahan.memory["state"] - stochastic.memory["state"]).sum()) == 2 * elements
    # Under ZeRO-1 and 2 gradients are of 16 bits in the backward pass either way.
    assert stochastic.memory["gradients"][0] <= masters.memory["gradients"][0]


def test_released_gradients_are_those_of_a_batch():
    model = load("llama-1b")
    largest, bucket = 4 * max(p.numel for p in model), 64 << 20  # where it steps
    kept, early = (usage_of(model="llama-1b", rank=256, release_gradients=x) for x in (False, True))
    assert kept.memory["gradients"][0] == 4 * sum(p.numel for p in model)
    assert bucket <= early.memory["gradients"][0] <= bucket + largest
    assert early.when == "backward" and early.total[0] < kept.total[0]


def test_activations_grow_with_tokens_and_checkpointing_keeps_a_block():
    def of(**run):
        return int(usage_of(run={"seq_len": 512, "precision": "fp32", **run}).memory["activations"][0])

    assert of(micro_batch=2) == pytest.approx(2 * of(), rel=0.05)
    assert of(checkpointing=True) < 0.6 * of()
    assert usage_of().memory["activations"][0] == 0


def test_the_peak_is_named_with_what_is_there_then():
    few, many = usage_of(run={"seq_len": 16}), usage_of(run={"seq_len": 2048, "micro_batch": 8})
    assert (few.when, many.when) == ("step", "backward")
    for found in (few, many):
        assert found.total[0] == sum(int(part[0]) for part in found.moments[found.when].values())
        assert found.total[0] == max(sum(int(part[0]) for part in held.values()) for held in found.moments.values())


def test_the_mildest_options_that_fit_are_found_or_the_least_that_is_needed():
    """No option is more than is needed: without any of them, or with a milder value, it does not fit."""
    ours = LoRAPreConfig(rank=1024)
    request = Request("7b", load("llama-7b"), "ddp", optimizer=ours, seq_len=2048)
    found = mildest(request, 22 * 2**30)
    assert found.fits and found.bytes <= 22 * 2**30
    assert found.options["weights"] == "stochastic" and "embeddings" not in found.options
    run = {"gradient_checkpointing": "checkpointing"}
    for name in found.options:
        fewer = {k: v for k, v in found.options.items() if k != name}
        ours = replace(request.optimizer, **{k: v for k, v in fewer.items() if k not in run})
        less = replace(request, optimizer=ours, **{run[k]: v for k, v in fewer.items() if k in run})
        assert plan(less, ("LoRAPre",))["LoRAPre"].total[0] > 22 * 2**30, name
    assert mildest(request, 1 << 40).options == {}
    none = mildest(request, 10 * 2**30)
    assert not none.fits and none.bytes > 12.5 * 2**30 and none.options["state_dtype"] == "8bit"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--weights", "kahan", "--precision", "fp32"], "weights='kahan': is for bf16 weights, not fp32"),
        (["--weights", "kahan", "--stage", "0"], "ZeRO stage 0 keeps fp32 masters"),
        (["--release_gradients"], "release_gradients=True: DeepSpeed's engine collects"),
        (["--release_gradients", "--layout", "fsdp1"], "FSDP1 shows gradients"),
        (["--release_gradients", "--layout", "ddp", "--accumulation", "2"], "cannot be accumulated over 2"),
        (["--seq_len", "0"], "seq_len 0: must be at least 1"),
        (["--seq_len", "8", "--layout", "tp"], "activations under tp are not planned for"),
    ],
)
def test_options_that_cannot_be_are_one_line(arguments, words, capsys):
    assert main(["plan", "--model", "llama-tiny", "--rank", "8", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_activations_of_other_blocks_are_refused():
    with pytest.raises(ConfigError, match="for the blocks of Llama"):
        plan(Request("toy", TOY, "ddp", optimizer=LoRAPreConfig(rank=8), seq_len=8))


@pytest.mark.slow
def test_the_command_says_which_options_fit(capsys):
    arguments = ["plan", "--model", "llama-1b", "--layout", "ddp", "--rank", "512", "--seq_len", "1024"]
    assert main([*arguments, "--max_memory", "8GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["max_memory"]
    assert found["fits"] and found["total"] <= found["bytes"] and found["options"]
    assert main([*arguments, "--max_memory", "8GiB"]) == 0
    text = capsys.readouterr().out
    assert f"fits in 8.00 GiB with {next(iter(found['options']))}" in text and "peak in" in text
    assert main([*arguments, "--max_memory", "1GiB"]) == 0
    assert "does not fit in 1.00 GiB; the least is" in capsys.readouterr().out
