from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from lorapre_dist.config import ConfigError
from lorapre_dist.layouts.base import local
from lorapre_dist.training.data.tokenizer import train_bpe
from lorapre_dist.training.engines import models, pretrained
from lorapre_dist.training.run.settings import Settings
from tests.distributed.harness import run_ranks

from .conftest import documents


def born_in_shards(
    rank: int, world_size: int, *, settings: Settings
) -> tuple[dict[str, torch.Tensor], dict[str, int], float]:
    """Whole parameters by name, the number of elements held here, and the loss on one batch."""
    model = models.build_model(models.model_config(settings), settings).eval()
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    sizes = {name: local(p).numel() for name, p in model.named_parameters()}
    tokens = torch.arange(32).view(2, 16)
    return whole, sizes, model(input_ids=tokens, labels=tokens).loss.item()


# GaLore's shapes: (hidden, intermediate, heads, layers), and parameters without embeddings and lm_head:
# layers * (4 h^2 + 3 h i + 2 h) + h.
SHAPES = {
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 16, 24),
    "llama-1b": (2048, 5461, 32, 24),
    "llama-7b": (4096, 11008, 32, 32),
    "llama-tiny": (128, 352, 4, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_presets_have_galores_shapes(name):
    hidden, intermediate, heads, layers = SHAPES[name]
    config = models.preset_config(name)
    found = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers)
    assert found == (hidden, intermediate, heads, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    body = layers * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden) + hidden
    assert models.count_parameters(model) == body + 2 * config.vocab_size * hidden
    assert config.vocab_size == (2048 if name == "llama-tiny" else 32000)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_positions_grow_with_the_sequence():
    assert models.preset_config("llama-60m", seq_len=4096).max_position_embeddings == 4096


def test_initial_weights_depend_on_seed_and_name_only(make_settings):
    settings = make_settings("--seed", "3")
    config = models.preset_config("llama-tiny")
    first = models.build_model(config, settings).state_dict()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    second = models.build_model(config, settings).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = models.build_model(config, make_settings("--seed", "4")).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    half = models.build_model(config, make_settings("--seed", "3", ds={"bf16": {"enabled": True}})).state_dict()
    assert all(torch.equal(first[name].bfloat16(), half[name]) for name in first)


def test_initial_weights_follow_the_models_own_rules(make_settings):
    model = models.build_model(models.preset_config("llama-tiny"), make_settings())
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            # 16,384 draws or more: the sample deviation of N(0, 0.02^2) is within 3% with great margin.
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


def write_config(path, **values):
    path.write_text(json.dumps(values))
    return str(path)


def test_any_causal_model_by_config_file(make_settings, tmp_path):
    values = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64}
    path = write_config(tmp_path / "gpt2.json", **values)
    settings = make_settings("--model_config", path, "--max_steps", "3", "--seq_len", "16")
    config = models.model_config(settings)
    models.fit_vocabulary(config, settings, [""] * 280)
    assert config.vocab_size == 300
    model = models.build_model(config, settings)
    assert model.lm_head.weight is model.get_input_embeddings().weight  # GPT-2 ties them
    assert all(p.isfinite().all() for p in model.parameters())
    tokens = torch.zeros(1, 16, dtype=torch.long)
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "not a usable model config: .*`model_type`"),
        ({"model_type": "no-such-model"}, "not a usable model config: .*no-such-model"),
        ({"model_type": "gpt2", "n_embd": "many"}, "not a usable model config: .*n_embd"),
        ({"model_type": "gpt2", "n_positions": 8}, "max_position_embeddings 8 is less than the 16 tokens"),
        ({"model_type": "vit"}, "vit is no causal LM"),
        ({"model_type": "llava"}, "llava is no causal LM"),
        ({"model_type": "bart"}, "bart is an encoder-decoder"),
        ({"model_type": "whisper"}, "whisper is an encoder-decoder"),
        ({"model_type": "mistral", "auto_map": {"AutoConfig": "code.Config"}, "hidden_size": -1}, "cannot build"),
    ],
)
@pytest.mark.parametrize("option", ["--model_config", "--model"])
def test_configs_that_cannot_be_trained_are_refused_in_a_short_line(make_settings, tmp_path, option, values, words):
    path = write_config(tmp_path / "m.json", **values)
    settings = make_settings(option, path, "--max_steps", "3", "--seq_len", "16")
    with pytest.raises(ConfigError, match=words) as caught:
        models.build_model(models.model_config(settings), settings)
    assert len(str(caught.value)) < 500 + len(path) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mamba2", "bamba", "nemotron_h", "jetmoe"])
def test_configs_as_transformers_saves_them(make_settings, tmp_path, kind):
    """Also those that JSON has no number for: Mamba2's time_step_limit is infinite."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    for given in (["--model", str(tmp_path)], ["--model_config", str(tmp_path / "config.json")]):
        config = models.model_config(make_settings(*given, "--max_steps", "3"))
        assert (config.model_type, config.use_cache) == (kind, False)


def test_quantised_models_give_shapes_but_no_weights(make_settings, tmp_path):
    write_config(tmp_path / "config.json", model_type="llama", quantization_config={"quant_method": "fp8"})
    (tmp_path / "tokenizer.json").touch()
    config = models.model_config(make_settings("--model", str(tmp_path), "--max_steps", "3"))
    assert not hasattr(config, "quantization_config")
    with pytest.raises(ConfigError, match="its weights are quantised"):
        models.model_config(make_settings("--init_from", str(tmp_path), "--max_steps", "3"))


def test_config_file_with_too_small_a_vocabulary(make_settings, tmp_path):
    path = write_config(tmp_path / "m.json", model_type="llama", vocab_size=100)
    settings = make_settings("--model_config", path, "--max_steps", "3")
    with pytest.raises(ConfigError, match="vocab_size 100 is less"):
        models.fit_vocabulary(models.model_config(settings), settings, [""] * 300)


@pytest.mark.slow
def test_fsdp2_models_are_born_in_shards_with_the_same_weights(make_settings, tmp_path):
    """Shapes that three ranks cannot share evenly, tied embeddings, and a model with rules of its own."""
    tied = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied |= {"hidden_size": 20, "intermediate_size": 37, "vocab_size": 50}
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    lorapre = {"optimizer": {"type": "LoRAPre", "params": {"rank": 4}}}
    for values in (tied, gpt2):
        path = write_config(tmp_path / "model.json", **values)
        options = ["--model_config", path, "--max_steps", "3", "--seq_len", "16"]
        settings = make_settings(*options, "--backend", "ddp", ds=lorapre)
        wanted = dict(models.build_model(models.model_config(settings), settings).named_parameters())
        sharded = make_settings(*options, "--backend", "fsdp2", ds=lorapre)
        for whole, sizes, loss in run_ranks(3, born_in_shards, settings=sharded):
            assert whole.keys() == wanted.keys()
            assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
            assert sum(sizes.values()) < 0.5 * sum(p.numel() for p in wanted.values())
            assert loss == pytest.approx(math.log(50), abs=0.5)


def test_weights_accept_their_own_token_ids_and_new_ones(tmp_path):
    own = train_bpe(documents(20), 300)
    own.save_pretrained(tmp_path)
    more = train_bpe(documents(20), 300)
    more.add_tokens(["<new>"])
    for tokenizer in (own, more):
        pretrained.check_token_ids(str(tmp_path), "--init_from", tokenizer)
    with pytest.raises(ConfigError, match=r"\d+ of the \d+ tokens .* have other ids"):
        pretrained.check_token_ids(str(tmp_path), "--init_from", train_bpe(["another text, other words"] * 9, 300))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_fsdp2_reads_the_saved_weights_rows_by_rows(kind, make_settings, tmp_path):
    """In several files, tied, named without a prefix, and experts that the files hold one by one; uneven shards."""
    sizes = {"vocab_size": 50, "hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = {
        "llama": LlamaConfig(**sizes),
        "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
        "mixtral": MixtralConfig(**sizes, num_local_experts=5),
    }[kind]
    torch.manual_seed(0)
    saved = AutoModelForCausalLM.from_config(config)
    (saved.transformer if kind == "gpt2" else saved).save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "tokenizer.json").touch()
    options = ["--init_from", str(tmp_path), "--max_steps", "3", "--seq_len", "16", "--backend", "fsdp2"]
    settings = make_settings(*options, ds={"optimizer": {"type": "LoRAPre", "params": {"rank": 4}}})
    wanted, tokens = dict(saved.named_parameters()), torch.arange(32).view(2, 16)
    loss = saved.eval()(input_ids=tokens, labels=tokens).loss.item()
    for whole, sizes, found in run_ranks(3, born_in_shards, settings=settings):
        assert whole.keys() == wanted.keys()
        assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
        assert sum(sizes.values()) < 0.5 * sum(p.numel() for p in wanted.values())
        assert found == pytest.approx(loss, rel=1e-6)


def test_buffers_keep_their_precision(make_settings):
    model = models.build_model(models.preset_config("llama-tiny"), make_settings())
    keeper = models.BufferKeeper(model)
    wanted = model.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    keeper.restore(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, wanted)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradients(make_settings):
    config = models.preset_config("llama-tiny")
    tokens = torch.arange(32).view(2, 16)
    gradients = []
    for options in ([], ["--gradient_checkpointing"]):
        model = models.build_model(config, make_settings(*options)).train()
        assert model.is_gradient_checkpointing == bool(options)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    # The recomputation runs the same kernels on the same values.
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
