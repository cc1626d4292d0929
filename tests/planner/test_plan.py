"""``lorapre plan`` without ranks: speed, formulas against real optimizers, models, output, bad input."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from galore_torch import GaLoreAdamW
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lorapre_dist.cli import main
from lorapre_dist.config import CONFIGS, ConfigError, LoRAPreConfig
from lorapre_dist.planner import LAYOUTS, PARTS, Parameter, Request, Zero, names, plan, smallest_world
from lorapre_dist.planner.arrange import arranged
from lorapre_dist.planner.command import size_of
from lorapre_dist.planner.models import find, llama, load, parameters
from lorapre_dist.planner.render import chart
from lorapre_dist.training.engines.models import preset_config
from lorapre_dist.training.engines.presets import PRESETS

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOY = tuple(
    Parameter(f"layers.{k}.{name}.weight", shape)
    for k in range(2)
    for name, shape in {"q_proj": (24, 24), "up_proj": (40, 24), "down_proj": (24, 40), "norm": (24,)}.items()
)

SOLVES = {"reduce Gram of B", "send inverse of B", "reduce Gram of A", "send gauge"}


@pytest.fixture
def folder(tmp_path):
    """A model folder that holds a 70B config."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


# size and speed -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_4096_ranks_and_70B_in_seconds(folder, layout):
    """For each of our optimizers with what it is compared with: at most 2.6 s of processor time on two quiet cores.

    Cores that are shared take up to twice as long. Importing libraries is not in it.
    """
    load("llama-tiny")
    world = 64 if layout == "tp" else 4096  # nobody splits a matrix over more
    for config in CONFIGS.values() if layout == "zero2" else [LoRAPreConfig]:
        start = time.process_time()
        request = Request("70B", load(str(folder)), layout, world, optimizer=config(rank=1024))
        found = plan(request)
        assert time.process_time() - start < 2 * 5
        assert request.elements == 70_553_706_496
        assert tuple(found) == names(request)


def test_llama_70b_is_there_to_plan_for():
    assert sum(p.numel for p in load("llama-70b")) == 68_976_648_192  # as Llama 2's


@pytest.mark.parametrize(
    "model, world, groups", [("llama-7b", 64, 63), ("llama-7b", 1024, 226), ("llama-70b", 1024, 421)]
)
def test_ranks_are_in_two_process_groups_at_most(model, world, groups):
    """However many share a matrix: each group is made by all ranks in turn, and takes memory of its members."""
    shares = arranged(Request("large", load(model), "zero2", world)).shares
    made = {tuple(s.ranks) for s in shares if s.shared and len(s.shape) == 2}
    assert len(made) == groups <= min(world, sum(len(s.shape) == 2 for s in shares))
    assert max(Counter(rank for ranks in made for rank in ranks).values()) == 2


@pytest.mark.parametrize("layout", ["zero1", "zero2", "zero3", "fsdp1", "fsdp2", "ddp"])
@pytest.mark.parametrize("world", [1, 3, 64, 1000])
def test_ranks_add_up(layout, world):
    """AdamW: that of one rank, or under DDP on each; LoRAPre: its closed form, and rows that are cut."""
    request = Request("60m", load("llama-60m"), layout, world, optimizer=LoRAPreConfig(rank=128))
    found = plan(request)
    adamw = found["AdamW"].memory["state"]
    assert int(adamw.sum()) == 8 * request.elements
    low_rank = [p.shape for p in request.parameters if request.is_low_rank(p)]
    vectors = request.elements - sum(p * q for p, q in low_rank)
    exact = 4 * sum((128 + 16) * (p + q) + p for p, q in low_rank) + 8 * vectors
    ours = int(found["LoRAPre"].memory["state"].sum())
    touched = 4 * (128 + 16 + 1) * len(low_rank) * world  # a row more for each rank and matrix, at most
    assert exact <= ours <= exact + touched
    assert found["LoRAPre"].memory["state"].shape == found["LoRAPre"].total.shape == adamw.shape or layout == "ddp"


def test_more_than_device_memory_is_found():
    request = Request("7b", load("llama-7b"), "zero2", optimizer=LoRAPreConfig(rank=1024))
    at = smallest_world(request, 40 * 2**30)
    needs = {n: plan(replace(request, world_size=n), ("LoRAPre",))["LoRAPre"].total.max() for n in (at, at // 2)}
    assert needs[at] <= 40 * 2**30 < needs[at // 2]
    assert smallest_world(request, 2**30) is None


def test_hybrid_sharding_is_sharding_in_each_group():
    model = load("llama-60m")
    for kind, config in CONFIGS.items():
        ours = config(rank=64)
        one = plan(Request("60m", model, "fsdp2", 4, optimizer=ours))[kind]
        many = plan(Request("60m", model, "hsdp", 12, optimizer=ours, shard_size=4))[kind]
        assert many.summary()["largest_rank"] == one.summary()["largest_rank"]
        assert {k: v.tolist() for k, v in many.sent.items()} == {k: v.tolist() for k, v in one.sent.items()}
        assert many.frame_sent.keys() - one.frame_sent.keys() == {"all-reduce gradients"}
    with pytest.raises(ConfigError, match="shard_size 5: 12 ranks are no multiple"):
        Request("60m", model, "hsdp", 12, shard_size=5)


def test_state_under_ddp_without_dealing_it_out_is_that_of_one_rank():
    model = load("llama-60m")
    alone = plan(Request("60m", model, "zero0", 1, "fp32"))["LoRAPre"]
    kept = plan(Request("60m", model, "ddp", 8, "fp32", shard_state=False))["LoRAPre"]
    dealt = plan(Request("60m", model, "ddp", 8, "fp32"))["LoRAPre"]
    assert kept.memory["state"].tolist() == alone.memory["state"].tolist() and not kept.sent
    assert dealt.memory["state"].sum() == alone.memory["state"].sum() and "broadcast parameters" in dealt.sent


# formulas against real optimizers -----------------------------------------------------------------------------------


def held(optimizer: torch.optim.Optimizer, projectors: bool = False) -> int:
    """Bytes of an optimizer's state, without step counts."""
    states = list(optimizer.state.values())
    tensors = [t for s in states for t in s.values() if isinstance(t, torch.Tensor) and t.ndim]
    if projectors:
        tensors += [s["projector"].ortho_matrix for s in states if "projector" in s]
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rivals_hold_what_the_plan_says(precision):
    request = Request("toy", TOY, "zero0", precision=precision, optimizer=LoRAPreConfig(rank=4))
    said = {name: int(usage.memory["state"][0]) for name, usage in plan(request).items()}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    def stepped(kinds, dtype):
        weights = [torch.nn.Parameter(torch.randn(p.shape, dtype=dtype)) for p in TOY]
        for w in weights:
            w.grad = torch.randn_like(w)
        optimizers = kinds([w for w in weights if w.ndim == 2], [w for w in weights if w.ndim == 1])
        for optimizer in optimizers:
            optimizer.step()
        return optimizers

    (both,) = stepped(lambda m, v: [torch.optim.AdamW([*m, *v])], torch.float32)
    assert said["AdamW"] == held(both)
    muon, rest = stepped(lambda m, v: [torch.optim.Muon(m), torch.optim.AdamW(v)], torch.float32)
    assert said["Muon"] == held(muon) + held(rest)
    projected = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    (galore,) = stepped(
        lambda m, v: [GaLoreAdamW([{"params": m, **projected}, {"params": v}], no_deprecation_warning=True)], dtype
    )
    assert said["GaLore"] == held(galore, projectors=True)


def test_offload_moves_state_and_masters_to_the_host():
    request = Request("tiny", load("llama-tiny"), "zero2", 4, optimizer=LoRAPreConfig(rank=16))
    here, there = plan(request), plan(replace(request, offload=True))
    for name in ("LoRAPre", "AdamW", "Muon"):
        assert not there[name].memory["state"].any()
        assert (there[name].host > here[name].memory["state"]).all()
        assert (there[name].total < here[name].total).all()
    assert not there["GaLore"].host.any()


def test_accumulation_costs_what_each_stage_does_per_micro_batch():
    model = load("llama-tiny")

    def sent(layout, accumulation):
        request = Request("tiny", model, layout, 8, optimizer=LoRAPreConfig(rank=16), accumulation=accumulation)
        usage = plan(request, ("LoRAPre",))["LoRAPre"]
        return usage.frame_sent, {k: v.tolist() for k, v in usage.sent.items()}, int(usage.memory["gradients"][0])

    for layout, growth in {"zero1": (1, 1), "zero2": (4, 1), "zero3": (4, 4)}.items():
        (once, ours, gradients), (often, same, more) = sent(layout, 1), sent(layout, 4)
        assert ours == same
        ratios = tuple(round(often[k] / once[k], 6) for k in once)
        assert ratios == growth
        assert more == gradients  # under ZeRO-1 they are whole to the end of every backward pass


# models -------------------------------------------------------------------------------------------------------------


def test_models_come_from_presets_folders_and_files(folder):
    assert load(str(folder)) == load(str(folder / "config.json"))
    for name in PRESETS:
        assert load(name) == parameters(preset_config(name))
    real = LlamaForCausalLM(preset_config("llama-tiny"))
    assert load("llama-tiny") == tuple(Parameter(n, tuple(p.shape)) for n, p in real.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 8, "head_dim": 64, "attention_bias": True},
        {"num_key_value_heads": None, "head_dim": None, "mlp_bias": True},
        {},
    ],
)
def test_the_shapes_of_a_llama_are_those_of_transformers(changes, tmp_path):
    config = LlamaConfig(**{**LLAMA_70B, "num_hidden_layers": 2, **changes})
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert load(str(tmp_path)) == llama(values) == llama(values | changes) == parameters(config)
    tied = "lm_head.weight" not in {p.name for p in llama(values)}
    assert tied == changes.get("tie_word_embeddings", False)


def test_a_llama_with_impossible_sizes_is_refused(tmp_path):
    """In the words of transformers."""
    path = tmp_path / "config.json"
    for changes in ({"hidden_size": -8}, {"num_hidden_layers": "two"}, {"mlp_bias": "no"}):
        path.write_text(json.dumps({"model_type": "llama", **LLAMA_70B, **changes}))
        with pytest.raises(ConfigError, match=r"not a usable model config|cannot build a causal LM"):
            load(str(path))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mistral", "gemma"])
def test_other_architectures(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    request = Request(kind, load(str(tmp_path)), "zero3", 16, optimizer=LoRAPreConfig(rank=64))
    assert plan(request)["LoRAPre"].memory["state"].max() < plan(request)["AdamW"].memory["state"].max()


# Published sizes: facebook/bart-large, openai/whisper-tiny (37.8M, of which 0.6M are fixed positions), t5-small and
# llava-1.5-7b.
WHOLE = {
    "bart": ("BartForConditionalGeneration", 406_291_456),
    "whisper": ("WhisperForConditionalGeneration", 37_184_640),
    "t5": ("T5ForConditionalGeneration", 60_506_624),
    "llava": ("LlavaForConditionalGeneration", 7_062_902_784),
    "mamba2": ("Mamba2ForCausalLM", None),
    "bamba": ("BambaForCausalLM", None),
    "mllama": ("MllamaForConditionalGeneration", None),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_all_of_a_model_is_planned(kind, tmp_path):
    """Not the decoder of an encoder-decoder alone, nor the language model of one that sees."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    name, elements = WHOLE[kind]
    found, shapes = find(str(tmp_path))
    assert found == name
    if elements is not None:
        assert sum(p.numel for p in shapes) == elements


def test_a_config_that_names_its_class_is_planned_as_that(tmp_path):
    config = LlamaConfig(**LLAMA_70B | {"num_hidden_layers": 1, "architectures": ["LlamaForSequenceClassification"]})
    config.save_pretrained(tmp_path)
    found, shapes = find(str(tmp_path))
    assert found == "LlamaForSequenceClassification"
    assert shapes[-1] == Parameter("score.weight", (2, 8192))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": "idefics2_vision"}, "transformers has no model of type idefics2_vision"),
        ({"model_type": "bart", "d_model": 15}, "cannot build BartForConditionalGeneration from this config: "),
        ({"model_type": "gpt2", "n_embd": -4}, "cannot build GPT2LMHeadModel from this config: "),
        ({"model_type": "qwen2", "hidden_size": None}, "hidden_size"),
    ],
)
def test_a_model_that_transformers_does_not_build_is_a_short_line(values, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["plan", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --model {tmp_path}") and words in error
    assert error.count("\n") == 1 and len(error) < 500 + len(str(tmp_path))


# the command --------------------------------------------------------------------------------------------------------

ARGUMENTS = ["plan", "--model", "llama-60m", "--stage", "2", "--world_size", "6", "--rank", "128"]


def test_the_table_says_what_the_json_says(capsys):
    assert main([*ARGUMENTS, "--max_memory", "2GiB"]) == 0
    text = capsys.readouterr().out
    assert main([*ARGUMENTS, "--max_memory", "2GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "in 56 matrices of rank 128, rank_v 16, stable" in text and found["low_rank_matrices"] == 56
    assert "ZeRO-2, 6 ranks, bf16" in text
    for name, usage in found["optimizers"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        total = usage["largest_rank"]["total"]
        assert f"{total / 2**20:.2f} MiB" in line or f"{total / 2**30:.2f} GiB" in line
    for note in found["notes"]:
        assert f"note: {note}" in text
    assert "LoRAPre fits in 2.00 GiB as it is: " in text
    assert found["max_memory"]["smallest_world_size"].keys() == set(LAYOUTS)


def test_json_has_numbers_in_bytes_alone(capsys):
    assert main([*ARGUMENTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {
        *("model", "elements", "low_rank_matrices", "low_rank_elements", "layout", "world_size", "precision"),
        *("offload", "accumulation", "rank", "rank_v", "variant", "optimizers", "notes"),
    }
    assert (found["model"], found["elements"], found["layout"]) == ("llama-60m", 58_073_600, "zero2")
    assert (found["rank"], found["rank_v"], found["variant"], found["offload"]) == (128, 16, "stable", False)
    assert list(found["optimizers"]) == ["LoRAPre", "AdamW", "Muon", "GaLore"]
    for usage in found["optimizers"].values():
        assert usage.keys() == {"largest_rank", "mean", "sent_per_step"}
        assert usage["largest_rank"].keys() == {"rank", *PARTS, "total", "host", "peak", "moments"}
        assert usage["mean"].keys() == {*PARTS, "total", "host"}
        assert sum(usage["largest_rank"][part] for part in PARTS) == usage["largest_rank"]["total"]
        assert math.isclose(sum(usage["mean"][part] for part in PARTS), usage["mean"]["total"], abs_tol=1)
        for purpose in usage["sent_per_step"]["optimizer"].values():
            assert 0 <= purpose["mean"] <= purpose["largest"]
    purposes = {"gather A", "edge rows", "reduce Z", *SOLVES}
    assert found["optimizers"]["LoRAPre"]["sent_per_step"]["optimizer"].keys() == purposes


def test_a_deepspeed_json_gives_stage_precision_and_settings(capsys, tmp_path):
    path = tmp_path / "ds.json"
    zero = {"stage": 3, "sub_group_size": 1e6, "stage3_max_live_parameters": 2e6, "overlap_comm": False}
    config = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "fp16": {"enabled": True},
        "optimizer": {"type": "LoRAPre", "params": {"lr": 0.01, "rank": 32, "variant": "paper"}},
        "zero_optimization": {**zero, "offload_optimizer": {"device": "cpu"}},
    }
    path.write_text(json.dumps(config))
    base = ["plan", "--model", "llama-60m", "--world_size", "4", "--json", "--deepspeed_config", str(path)]
    assert main(base) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["precision"], found["offload"]) == ("zero3", "fp16", True)
    assert (found["rank"], found["rank_v"], found["variant"], found["accumulation"]) == (32, 32, "paper", 4)
    ours = LoRAPreConfig(rank=32, variant="paper")
    knobs = Zero(sub_group_size=10**6, max_live_parameters=2 * 10**6, overlap_comm=False)
    request = Request("60m", load("llama-60m"), "zero3", 4, "fp16", True, ours, 4, knobs)
    assert found["optimizers"]["LoRAPre"] == plan(request)["LoRAPre"].summary()
    assert main([*base, "--stage", "2", "--precision", "bf16", "--rank", "16", "--accumulation", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["precision"], found["rank"]) == ("zero2", "bf16", 16)
    assert (found["variant"], found["accumulation"]) == ("paper", 2)


@pytest.mark.parametrize("layout", ["zero3", "fsdp2"])
def test_plot_draws_a_picture(layout, tmp_path, capsys):
    file = tmp_path / "memory.png"
    assert main(["plan", "--model", "llama-60m", "--layout", layout, "--world_size", "8", "--plot", str(file)]) == 0
    assert f"chart: {file}" in capsys.readouterr().out
    picture = file.read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_the_chart_covers_no_curve_and_says_how_far_it_is(monkeypatch, tmp_path, capsys):
    """Its legends lie below the axes; a bar counts the plans where there are many, and large ones."""
    overlaps = []

    def saved(figure, path, **_):
        figure.canvas.draw()
        for axes in figure.axes:
            overlaps.append(axes.get_legend().get_window_extent().overlaps(axes.get_window_extent()))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", saved)
    monkeypatch.setattr("lorapre_dist.planner.render.PATIENCE", 0.0)
    request = Request("60m", load("llama-60m"), "zero2", 8, optimizer=LoRAPreConfig(rank=16))
    chart(request, tmp_path / "p.png")
    assert overlaps == [False, False]
    assert "0/14" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--model"),
        (["--modle", "llama-7b"], "unknown option --modle: did you mean --model?"),
        (["--model", "llama-8b"], "llama-7b"),
        (["--model", "no-such-owner/no-such-model"], "no such folder, and as a hub name"),
        (["--model", "./llama"], "no such folder or file"),
        (["--model", "/"], "no config.json"),
        (["--model", "setup.py"], "not a usable model config"),
        (["--model", "llama-tiny", "--world_size", "0"], "world_size 0: must be from 1"),
        (["--model", "llama-tiny", "--world_size", "many"], "invalid int value: 'many'"),
        (["--model", "llama-tiny", "--rank", "0"], "rank=0"),
        (["--model", "llama-tiny", "--rank", "200"], "rank must be below 128"),
        (["--model", "llama-tiny", "--rank", "8", "--target_modules", "nope"], "matches no matrix"),
        (["--model", "llama-tiny", "--rank", "8", "--target_modules", "("], "not a valid regular expression"),
        (["--model", "llama-tiny", "--stage", "4"], "invalid choice: 4"),
        (["--model", "llama-tiny", "--layout", "zero9"], "invalid choice: 'zero9'"),
        (["--model", "llama-tiny", "--layout", "fsdp2", "--stage", "2"], "give one of them"),
        (["--model", "llama-tiny", "--rank", "8", "--layout", "ddp", "--offload"], "offload: needs"),
        (["--model", "llama-tiny", "--rank", "8", "--accumulation", "0"], "accumulation 0"),
        (
            ["--model", "llama-tiny", "--rank", "8", "--flops", "300T"],
            "--bandwidth, --network: needed to predict seconds",
        ),
        (
            ["--model", "llama-tiny", "--rank", "8", "--device", "a100", "--launch", "0"],
            "--launch 0: must be a positive",
        ),
        (["--model", "llama-tiny", "--rank", "8", "--device", "a1"], "invalid choice: 'a1'"),
        (["--model", "llama-tiny", "--rank", "8", "--flops", "fast"], "invalid rate value: 'fast'"),
        (["--model", "llama-tiny", "--rank", "8", "--optimizer", "LoRAPreSGD", "--rank_v", "2"], "LoRAPreSGD has none"),
        (
            ["--model", "llama-tiny", "--rank", "8", "--layout", "hsdp", "--world_size", "12"],
            "12 ranks are no multiple",
        ),
        (["--model", "llama-tiny", "--max_memory", "big"], "must be a size such as 80GiB"),
        (["--model", "llama-tiny", "--max_memory", "80"], "is 80 bytes; give a unit, such as 80GiB"),
        (["--model", "llama-tiny", "--max_memory", "1023.5KiB"], "is 1,048,064 bytes; give a unit"),
        (["--model", "llama-tiny", "--deepspeed_config", "/nowhere.json"], "no such file"),
        (["--model", "llama-tiny", "--rank", "8", "--plot", "/nowhere/p.png"], "cannot be written"),
        (["--model", "llama-tiny", "--rank", "8", "--plot", "p.nothing"], "cannot be written"),
        (["--model", "llama-tiny", "--wrld_size", "2"], "did you mean --world_size?"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("lorapre_dist.planner.render.PATIENCE", 1e9)  # no bar, however busy the machine is
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error


@pytest.mark.parametrize(
    "section, words",
    [
        ({"stage": 2, "reduce_bucket_size": True}, "reduce_bucket_size=True: must be a number"),
        ({"stage": 2, "overlap_comm": 3}, "overlap_comm=3: Input should be a valid boolean"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme"),
    ],
)
def test_bad_json_is_one_line(section, words, capsys, tmp_path):
    path = tmp_path / "ds.json"
    optimizer = {"type": "LoRAPre", "params": {"rank": 8}}
    path.write_text(json.dumps({"train_batch_size": 8, "optimizer": optimizer, "zero_optimization": section}))
    assert main(["plan", "--model", "llama-tiny", "--deepspeed_config", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_batch_sizes_that_do_not_fit_the_ranks_are_named(capsys):
    path = "ds_configs/llama_7b_zero2.json"
    assert main(["plan", "--model", "llama-7b", "--world_size", "4096", "--deepspeed_config", path]) == 2
    assert "or give --accumulation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, size",
    [("80GiB", 80 * 2**30), ("80 gb", 80 * 2**30), ("1.5T", 3 * 2**39), ("85899345920", 80 * 2**30), ("7m", 7 * 2**20)],
)
def test_sizes(text, size):
    assert size_of(text) == size
