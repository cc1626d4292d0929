"""Which parameters are low-rank: real models' names, the user's choice, wrappers, and what is said when none is."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, param_groups
from lorapre_dist.config.param_groups import clean_name, explain_no_match, is_low_rank, matches

IDS = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": 50}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SIZES, "intermediate_size": 64, "pad_token_id": 2, **IDS}
GQA = {**SMALL, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, **IDS}
CAUSAL = {
    "llama": transformers.LlamaConfig(**GQA),
    "llama-tied": transformers.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**GQA),
    "qwen2": transformers.Qwen2Config(**GQA),
    "gemma2": transformers.Gemma2Config(**GQA, head_dim=8),
    "phi": transformers.PhiConfig(**GQA),
    "phi3": transformers.Phi3Config(**GQA),
    "gpt2": transformers.GPT2Config(**GPT),
    "gpt-j": transformers.GPTJConfig(**GPT, rotary_dim=4),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL),
    "opt": transformers.OPTConfig(**SIZES, **IDS, ffn_dim=64, word_embed_proj_dim=16),
    "falcon": transformers.FalconConfig(**SIZES, **IDS),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS),
}


def built(config, auto=transformers.AutoModelForCausalLM):
    with torch.device("meta"):
        return auto.from_config(config)


def two_d(model):
    """2-D parameters by name, split into those of a numbered block (attention, MLP) and the others."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inside, outside = set(), set()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            in_block = any(part.isdigit() for part in name.split(".")) and id(parameter) not in embeddings
            (inside if in_block else outside).add(name)
    return inside, outside


# default targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_defaults_select_the_projections_of_every_block_and_nothing_else(name):
    model = built(CAUSAL[name])
    inside, outside = two_d(model)
    assert inside
    assert outside  # the embedding at least
    assert {n for n in inside | outside if matches(n)} == inside


def test_defaults_select_the_attention_and_mlp_of_t5():
    config = transformers.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8, vocab_size=50)
    inside, outside = two_d(built(config, transformers.AutoModelForSeq2SeqLM))
    assert {n for n in inside | outside if matches(n)} == inside
    assert any("relative_attention_bias" in n for n in outside)


def test_defaults_select_the_encoder_of_bert():
    inside, outside = two_d(built(transformers.BertConfig(**SMALL), transformers.AutoModelForMaskedLM))
    assert all(matches(n) for n in inside)
    assert not any(matches(n) for n in outside if "embeddings" in n or "decoder" in n)


def test_defaults_know_torch_transformers_and_metas_names():
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)
    inside, _ = two_d(model)
    assert len(inside) == 4
    assert all(matches(n) for n in inside)
    assert all(matches(f"layers.3.attention.{w}.weight") for w in ("wq", "wk", "wv", "wo"))
    assert all(matches(f"layers.3.feed_forward.{w}.weight") for w in ("w1", "w2", "w3"))


def test_lora_adapters_take_adamw_unless_asked():
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not matches(name)
    assert matches(name, ["lora_A"])
    with pytest.raises(ConfigError, match=r"LoRA adapters take AdamW unless target_modules names them: \["):
        LoRAPre([(name, nn.Parameter(torch.zeros(8, 16)))], rank=2)
    LoRAPre([(name, nn.Parameter(torch.zeros(8, 16)))], rank=2, target_modules=["lora_A", "lora_B"])


@pytest.mark.parametrize(
    ("shape", "name", "low_rank"),
    [
        ((8, 64, 32), "mlp.input_linear.weight", True),
        ((64, 16, 32), "mlp.experts.down_proj", True),  # many small experts
        ((64, 16, 32), "mlp.input_linear.weight", False),
        ((64, 4, 16), "rel_attn.q", False),  # d_model x heads x head_dim
        ((32, 32, 16), "conv.weight", False),
        ((8, 16, 16), "conv.weight", False),
        ((8, 64), "mlp.experts.down_proj_bias", False),
    ],
)
def test_three_dimensions_are_a_stack_or_no_matrix(shape, name, low_rank):
    assert is_low_rank(f"layers.0.{name}", shape, 2, 1, None) is low_rank
    assert is_low_rank(f"layers.0.{name}", shape, 2, 1, ".*")  # asked for
    if low_rank:  # so is each of its matrices
        assert is_low_rank(f"layers.0.{name}[3]", shape[1:], 2, 1, None)


@pytest.mark.parametrize(
    ("name", "low_rank"),
    [
        # A number that ends the layer's own name is none of a block.
        *[("layers.0.mlp.2.weight", True), ("to_out.0.weight", False), ("embed_tokens.0.weight", False)],
        *[("layers.0.norm.linear.weight", True), ("layers.0.norm.weight", False), ("layers.0.ln_1.weight", False)],
        # What the list of blocks is called counts, and what lies above it does not.
        *[("bbox_heads.0.layers.1.weight", False), ("embeddings.encoder.layers.0.fc.weight", True)],
        *[("layers.0.attention.q_head.weight", True), ("layers.61.shared_head.head.weight", False)],
        *[("layers.0.multi_head_attention.q.weight", True), ("layers.0.mlp.gate.weight", False)],
        *[("layers.0.mlp.gate_proj.weight", True), ("layers.0.cross_attn_image_to_token.q_proj.weight", True)],
        *[("layers.0.attn.rel_pos_h", False), ("layers.0.mixer.A_log", False), ("layers.0.in_proj", True)],
    ],
)
def test_the_structure_of_a_name(name, low_rank):
    assert matches(name) is low_rank


def test_small_llama_by_number():
    """Seven matrices a block; embedding, head and norms under AdamW; k and v are too narrow for rank 16."""
    model = built(CAUSAL["llama"])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    selected = [n for n, shape in shapes.items() if is_low_rank(n, shape, 15, 1, None)]
    assert len(selected) == 14
    narrow = [n for n, shape in shapes.items() if is_low_rank(n, shape, 16, 2, None)]
    assert {n for n in selected if "k_proj" in n or "v_proj" in n} == set(selected) - set(narrow)


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "transformer.wte.weight"),
        *("model.layers.0.input_layernorm.weight", "embeddings.weight", "classifier.weight", "my_q_proj.weight"),
        *("q_projection.weight", "score.weight", "gpt_neox.embed_in.weight", "transformer.ln_f.weight"),
    ],
)
def test_defaults_leave_embeddings_heads_and_norms_alone(name):
    assert not matches(name)


# the user's choice ----------------------------------------------------------------------------------------------

Q3 = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "targets",
    [
        # dotted parts of the name
        *(["q_proj"], ["self_attn.q_proj"], ["layers.3"], [Q3], ["x", "q_proj"], ("q_proj",)),
        # expressions for the whole name
        *(r".*q_proj\.weight", r"model\.layers\.\d+\..*", [r".*\.(q|k)_proj\..*"], Q3),
    ],
)
def test_target_modules_that_select(targets):
    assert matches(Q3, targets)


@pytest.mark.parametrize(
    "targets",
    [
        *(["q"], ["proj"], ["layers.33"], ["_proj"], ["k_proj", "v_proj"], ["layers.3.q_proj"]),
        *("q_proj", r"q_proj\.weight", r"model\.layers\.[0-2]\..*", ""),  # a string is for the whole name
    ],
)
def test_target_modules_that_do_not_select(targets):
    assert not matches(Q3, targets)


@pytest.mark.parametrize("targets", ["*q_proj", ["(q_proj"], ["k_proj", "q_proj["]])
def test_a_bad_expression_is_named(targets):
    with pytest.raises(ConfigError, match="not a valid regular expression") as caught:
        matches(Q3, targets)
    bad = targets if isinstance(targets, str) else targets[-1]
    assert str(caught.value).startswith(f"target_modules={bad!r}: ")
    with pytest.raises(ConfigError, match="not a valid regular expression"):
        LoRAPre([("w", nn.Parameter(torch.zeros(9, 9)))], rank=2, target_modules=targets)


@pytest.mark.parametrize(
    ("shape", "rank", "rank_v", "selected"),
    [
        ((9, 9), 8, 1, True),
        ((9, 8), 8, 1, False),  # min(p, q) > rank
        ((8, 9), 8, 1, False),
        ((9, 9), 0, 1, False),
        ((9,), 1, 1, False),
        ((2, 9, 9), 1, 1, True),  # a stack of two
        ((9, 9, 2), 2, 1, False),
        ((9, 9, 9, 9), 1, 1, False),
        ((9, 9), 4, 9, True),  # rank_v may be as large as the matrix
        ((9, 9), 4, 10, False),
    ],
)
def test_shape_and_rank(shape, rank, rank_v, selected):
    assert is_low_rank("q_proj.weight", shape, rank, rank_v, None) is selected
    assert not is_low_rank("lm_head.weight", shape, rank, rank_v, None)


# wrappers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        f"module.{Q3}",  # DDP
        f"module.module.{Q3}",
        f"_orig_mod.{Q3}",  # torch.compile
        f"module._orig_mod.{Q3}",
        f"_orig_mod.module.{Q3}",
        f"_fsdp_wrapped_module.{Q3.replace('layers.3', 'layers.3._fsdp_wrapped_module')}",
        Q3.replace("layers.3", "layers.3._checkpoint_wrapped_module"),
        Q3.replace("self_attn", "_orig_mod.self_attn"),
        Q3,
    ],
)
def test_wrappers_do_not_change_a_name(wrapped):
    assert clean_name(wrapped) == Q3
    assert matches(wrapped, r"model\.layers\.3\.self_attn\.q_proj\.weight")


def test_a_module_inside_the_model_keeps_its_name():
    assert clean_name("encoder.module.weight") == "encoder.module.weight"
    assert clean_name("module") == "module"


# messages -------------------------------------------------------------------------------------------------------

SHAPES = [("embed.weight", (50, 8)), ("a.q_proj.weight", (8, 8)), ("b.up_proj.weight", (16, 12)), ("norm", (8,))]


def test_a_rank_that_no_selected_matrix_allows_names_the_largest():
    message = explain_no_match(SHAPES, 12, None)
    assert message.startswith("rank=12: ")
    assert "b.up_proj.weight (16 x 12)" in message
    assert "below 12" in message
    assert is_low_rank("b.up_proj.weight", (16, 12), 11, 1, None)  # what it says to do helps


def test_a_rank_v_that_no_selected_matrix_allows_is_named_itself():
    with pytest.raises(ConfigError, match=r"^rank_v=13: .*b\.up_proj\.weight \(16 x 12\).* at most 12$"):
        LoRAPre([(n, nn.Parameter(torch.zeros(shape))) for n, shape in SHAPES], rank=4, rank_v=13)


def test_targets_that_match_nothing_show_what_there_is():
    message = explain_no_match(SHAPES, 4, ["k_proj"])
    assert message.startswith("target_modules=['k_proj']: matches no matrix of this model")
    assert "(3 2-D or 3-D parameters: embed.weight, a.q_proj.weight, b.up_proj.weight)" in message


def test_defaults_that_match_nothing_and_many_names():
    message = explain_no_match([(f"x{i}", (8, 8)) for i in range(9)], 4, None)
    assert message.startswith("the default target_modules: matches no matrix of this model")
    assert "(9 2-D or 3-D parameters: x0, x1, x2, x3, ...)" in message


def test_a_model_without_matrices():
    assert explain_no_match([("norm", (8,))], 4, None).endswith("of this model (it has none)")


@pytest.mark.parametrize(("rank", "targets"), [(12, None), (4, ["k_proj"]), (4, "nothing")])
def test_messages_are_one_line(rank, targets):
    assert "\n" not in explain_no_match(SHAPES, rank, targets)


# param_groups ---------------------------------------------------------------------------------------------------


def test_param_groups_of_a_llama():
    model = built(CAUSAL["llama"])
    low_rank, rest = param_groups(model)
    assert {n for n, _ in low_rank["params"]} == two_d(model)[0]
    assert set(low_rank) == {"params"}
    assert rest["rank"] == 0
    named = dict(model.named_parameters())
    both = low_rank["params"] + rest["params"]
    assert [n for n, _ in both if named[n] is not dict(both)[n]] == []
    assert sorted(n for n, _ in both) == sorted(named)


def test_param_groups_build_an_optimizer_with_their_own_options():
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL["llama"])
    low_rank, rest = param_groups(model)
    optimizer = LoRAPre([{**low_rank, "lr": 0.5}, rest], lr=0.1, rank=4)
    assert [(g["lr"], g["rank"]) for g in optimizer.param_groups] == [(0.5, 4), (0.1, 0)]
    assert set(optimizer.factors()) == two_d(model)[0]


def test_param_groups_take_targets_leave_out_frozen_and_need_no_rest():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight.requires_grad_(False)
    groups = param_groups(model, ["a"])
    assert [[n for n, _ in g["params"]] for g in groups] == [["a.weight"]]
    with pytest.raises(ConfigError, match=r"target_modules=\['b'\]: matches no matrix"):
        param_groups(model, ["b"])
    with pytest.raises(ConfigError, match="the default target_modules: matches no matrix"):
        param_groups(model)


def test_param_groups_read_the_shape_of_a_partitioned_parameter():
    """Under DeepSpeed's zero.Init a parameter is empty and ``ds_shape`` has its shape."""
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    low_rank, rest = param_groups(model)
    assert [n for n, _ in low_rank["params"]] == ["q_proj.weight"]
    assert len(rest["params"]) == 3
    LoRAPre([low_rank, rest], rank=4)  # a valid choice of parameters; where they lie, the engine says later
