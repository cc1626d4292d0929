from __future__ import annotations

import pytest

from lorapre_dist.config import ConfigError, extras
from lorapre_dist.config.ds_training import batch_sizes, precision, read_deepspeed_config, zero_stage
from lorapre_dist.training.engines.presets import CARDS, LR_GRID, RECIPES, STAGES
from lorapre_dist.training.run.settings import load_settings


def test_defaults_follow_the_preset(make_settings):
    settings = make_settings("--model", "llama-60m")
    assert (settings.max_steps, settings.warmup_steps, settings.seq_len) == (10_000, 1000, 256)
    assert make_settings().model == "llama-tiny"


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_is_the_papers_run(name):
    """10k, 20k, 60k, 100k and 150k steps of 512 x 256 tokens, warm-up 10%, rank 128/256/256/512/1024, scale 0.25."""
    steps, rank, lr = {
        "llama-60m": (10_000, 128, 0.01),
        "llama-130m": (20_000, 256, 0.01),
        "llama-350m": (60_000, 256, 0.005),
        "llama-1b": (100_000, 512, 0.005),
        "llama-7b": (150_000, 1024, 0.005),
    }[name]
    for world in (1, 8, 16):
        settings = load_settings(["--recipe", name], world)
        assert (settings.model, settings.dataset, settings.tokenizer) == (name, "c4", "t5-base")
        assert (settings.max_steps, settings.warmup_steps, settings.seq_len) == (steps, steps // 10, 256)
        assert settings.batch.global_batch == 512
        params = settings.ds_config["optimizer"]["params"]
        assert (params["rank"], params["scale"], params["lr"]) == (rank, 0.25, lr)
        assert lr in LR_GRID


def test_a_recipe_for_a_card_sets_what_saves_memory():
    assert {*STAGES, *CARDS} == set(RECIPES)
    settings = load_settings(["--recipe", "llama-7b-24g"], 1)
    assert (settings.model, settings.backend, settings.seq_len) == ("llama-7b", "ddp", 2048)
    assert settings.gradient_checkpointing and settings.output_dir == "runs/llama-7b-24g"
    assert (settings.batch.micro_batch, settings.batch.accumulation) == (1, 1)
    params = settings.ds_config["optimizer"]["params"]
    assert (params["weights"], params["release_gradients"]) == ("stochastic", True)


def test_options_go_before_the_recipe(make_settings):
    settings = make_settings("--recipe", "llama-60m", "--dataset", "builtin", "--lr", "0.001", "--max_steps", "50")
    assert (settings.dataset, settings.model, settings.max_steps, settings.warmup_steps) == (
        "builtin",
        "llama-60m",
        50,
        5,
    )
    assert settings.ds_config["optimizer"] == {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}}


def test_a_tokenised_folder_brings_the_tokenizer_of_a_recipe(make_settings, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert make_settings("--recipe", "llama-60m", "--dataset", str(tmp_path)).tokenizer is None
    given = make_settings("--recipe", "llama-60m", "--dataset", str(tmp_path), "--tokenizer", "x/y")
    assert given.tokenizer == "x/y"


def test_weights_bring_their_tokenizer(make_settings, tmp_path):
    """The folder's, unless another is given, or the text is tokenised already."""
    model, tokenised = tmp_path / "model", tmp_path / "tokenised"
    for folder, files in ((model, ("config.json", "tokenizer.json")), (tokenised, ("manifest.json",))):
        folder.mkdir()
        for name in files:
            (folder / name).write_text("{}")
    options = ["--init_from", str(model), "--max_steps", "3"]
    settings = make_settings(*options)
    assert (settings.model, settings.tokenizer, settings.model_name) == (None, str(model), str(model))
    assert (settings.model_option, settings.first_weights) == ("--init_from", "its own weights")
    assert make_settings(*options, "--tokenizer", "x/y").tokenizer == "x/y"
    assert make_settings(*options, "--dataset", str(tokenised)).tokenizer is None
    assert make_settings("--recipe", "llama-60m", *options).model_name == str(model)
    assert make_settings("--init_from", "owner/name", "--max_steps", "3").tokenizer == "owner/name"


def test_a_model_folder_gives_shapes_alone(make_settings, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "config.json"), "owner/name", "gpt2"):
        settings = make_settings("--model", name, "--max_steps", "3")
        assert (settings.model_name, settings.preset) == (name, False)
        assert (settings.tokenizer, settings.first_weights) == (None, "random weights")


def test_lr_overrides_the_json_only_where_given(make_settings):
    assert make_settings().ds_config["optimizer"]["params"]["lr"] == 0.01
    assert make_settings("--lr", "0.003").ds_config["optimizer"]["params"]["lr"] == 0.003


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max_steps", "0"], "--max_steps 0"),
        (["--max_steps", "5", "--warmup_steps", "6"], "more than --max_steps"),
        (["--recipe", "llama-2b"], "invalid choice: 'llama-2b'"),
        (["--shuffle_buffer", "-1"], "--shuffle_buffer -1"),
        (["--read_attempts", "0"], "--read_attempts 0"),
        (["--model", "llama-60n"], "did you mean llama-60m"),
        (["--model", "llama-60m", "--model_config", "x.json"], "not both"),
        (["--model_config", "missing.json"], "no such file"),
        (["--model", "owner/name"], "--max_steps is needed with --model"),
        (["--model", "/no/such/folder"], "--model /no/such/folder: no such folder"),
        (["--init_from", "x/y", "--model_config", "x.json"], "--model_config or --init_from, not both"),
        (["--init_from", "x/y"], "--max_steps is needed with --init_from"),
        (["--max_step", "3"], "did you mean --max_steps"),
        (["--max_steps", "many"], "invalid int value"),
        (["--dataset", "missing.jsonl"], "no such file"),
        (["--dataset", "/no/such/folder"], "no such file or folder"),
        (["--dataset", "nothing*.txt"], "no file matches"),
        (["--tokenizer", "./missing"], "no such folder"),
        (["--seq_len", "1"], "--seq_len 1"),
        (["--vocab_size", "100"], "at least 257"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--lr", "nan"], "--lr nan"),
        (["--eval_fraction", "1.5"], "between 0 and 1"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_options_say_what_is_wrong(make_settings, options, words):
    with pytest.raises(ConfigError, match=words.replace("*", r"\*")) as caught:
        make_settings(*options)
    assert "\n" not in str(caught.value)


def test_wandb_that_is_not_installed_is_named(make_settings, monkeypatch):
    monkeypatch.setattr(extras, "has", lambda package: package != "wandb")
    with pytest.raises(ConfigError, match=r"--wandb: needs wandb: pip install 'lorapre-dist\[wandb\]'"):
        make_settings("--wandb")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "given twice"),
        ('{"train_batch_size": 4}', '"optimizer"'),
        ('{"train_batch_size": "auto", "optimizer": {"type": "LoRAPre"}}', "train_batch_size is 'auto'"),
        ('{"optimizer": {"type": "LoRAPre", "params": {"lr": "auto"}}}', "optimizer.params.lr is 'auto'"),
        ('{"optimizer": {"type": "LoRAPre"}, "scheduler": {}}', "remove 'scheduler'"),
        ('{"optimizer": {"type": "LoRAPre", "params": 3}}', "must be a JSON object"),
    ],
)
def test_bad_json_says_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_deepspeed_config(str(path))


def test_missing_json_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: no such file"):
        load_settings(["--deepspeed_config", str(tmp_path / "none.json")], 1)
    with pytest.raises(ConfigError, match=r"--deepspeed_config is needed.*--recipe"):
        load_settings([], 1)


def test_batch_sizes_fill_in_what_is_left_out():
    total, micro, steps = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    for given in ({total: 16, micro: 4}, {total: 16, steps: 2}, {micro: 4, steps: 2}, {total: 16, micro: 4, steps: 2}):
        sizes = batch_sizes(given, 2)
        assert (sizes.global_batch, sizes.micro_batch, sizes.accumulation) == (16, 4, 2)
    assert batch_sizes({micro: 4}, 3).global_batch == 12


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4},
        {"train_batch_size": 0},
        {"train_batch_size": 2.5},
        {"train_batch_size": 2},
    ],
)
def test_batch_sizes_that_cannot_be_met_are_refused(config):
    with pytest.raises(ConfigError):
        batch_sizes(config, 3)


def test_stage_and_precision():
    assert zero_stage({}) == 0
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3
    assert precision({}) == "fp32"
    assert precision({"bf16": {"enabled": True}}) == "bf16"
    assert precision({"bf16": {"enabled": False}, "fp16": {"enabled": True}}) == "fp16"


RELEASED = {"optimizer": {"type": "LoRAPre", "params": {"lr": 0.01, "rank": 4, "release_gradients": True}}}


@pytest.mark.parametrize(
    ("options", "ds", "words"),
    [
        ([], {"train_batch_size": 2}, "DeepSpeed's engine collects gradients.*--backend fsdp2"),
        (
            ["--backend", "fsdp2"],
            {"train_batch_size": 2},
            "gradient_clipping=1, DeepSpeed.*max_update.*clip_each",
        ),
        (["--backend", "ddp"], {"train_batch_size": 2, "gradient_clipping": 0.5}, r"gradient_clipping=0.5\)"),
        (["--backend", "fsdp2"], {"gradient_clipping": 0}, "over 2 micro-batches.*--gradient_checkpointing"),
    ],
)
def test_what_needs_all_gradients_where_they_are_released(make_settings, options, ds, words):
    with pytest.raises(ConfigError, match=words):
        make_settings(*options, ds={**RELEASED, **ds})


def test_gradients_are_released_by_the_json_or_by_an_option(make_settings):
    plain = {"optimizer": {"type": "LoRAPre", "params": {"rank": 4}}, "gradient_clipping": 0, "train_batch_size": 2}
    assert "release_gradients" not in make_settings("--backend", "fsdp2", ds=plain).ds_config["optimizer"]["params"]
    asked = make_settings("--backend", "fsdp2", "--release_gradients", ds=plain)
    assert asked.ds_config["optimizer"]["params"] == {"rank": 4, "release_gradients": True}
    make_settings("--backend", "ddp", ds={**RELEASED, "gradient_clipping": 0, "train_batch_size": 2})
