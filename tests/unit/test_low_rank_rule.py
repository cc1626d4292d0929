"""Which parameters are low-rank by default, in the families of models that transformers builds, on the meta device."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections import Counter
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lorapre_dist.config.param_groups import is_low_rank, layer_kinds, low_rank_parameters

# Tried in this order; the first that knows a config builds it.
AUTOS = (
    *("AutoModelForPreTraining", "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM"),
    *("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCTC", "AutoModelForImageClassification"),
    *("AutoModelForObjectDetection", "AutoModel"),
)
PLAIN = (
    *("bart", "bert", "bloom", "clip", "deepseek_v3", "falcon", "gemma2", "gpt2", "gpt_neox", "granitemoe"),
    *("jamba", "llama", "llava", "mistral", "mixtral", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "roberta", "t5"),
    *("vit", "whisper"),
)
# Families whose projections have other names than those, or parameters that look like projections and are none.
OTHER = (
    *("bamba", "deberta-v2", "distilbert", "funnel", "gpt_oss", "jetmoe", "mamba", "mamba2", "nemotron_h"),
    *("olmo_hybrid", "qwen3_5", "recurrent_gemma", "rwkv", "sam", "siglip", "swin", "wav2vec2", "wav2vec2-bert"),
    *("xlnet", "zamba"),
)
# The share that is neither low-rank nor an embedding, a head or a convolution is above a tenth, because ...
EXCEPTIONS = {
    "mobilebert": "half of its head is no output embedding",
    "muse_spark_audio": "what projects to the text model is as large as 14% of the encoder, and outside of its blocks",
    "patchtsmixer": "of its 1,512 parameters a fifth are biases, norms and the embedding of patches",
    "xlnet": "projections are d_model x heads x head_dim, which are neither matrices nor stacks of them",
}


@functools.cache
def build(model_type):
    """A model of default sizes without memory, tied as it is trained; None if transformers builds none of that type."""
    try:
        config = transformers.AutoConfig.for_model(model_type)
    except Exception:
        return None
    for auto in AUTOS:
        with contextlib.suppress(Exception), torch.device("meta"), no_init_weights():
            model = getattr(transformers, auto).from_config(config)
            with contextlib.suppress(Exception):
                model.tie_weights()
            return model
    return None


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def by_name(model):
    """What is low-rank at rank 1 where only names and shapes are known."""
    return {n for n, p in trained(model).items() if is_low_rank(n, p.shape, 1, 1, None)}


def by_type(model):
    """The same where the module is known."""
    return {n for n, p in low_rank_parameters(model) if min(p.shape[-2:]) > 1}


def apart(model):
    """Names of embeddings, heads and convolutions: no part of what a low-rank optimizer is asked for."""
    found = {n for n, p in model.named_parameters() if p.ndim > 3 or re.search(r"embed|(^|[._])head", n)}
    heads = {id(m.get_output_embeddings()) for m in model.modules() if hasattr(m, "get_output_embeddings")}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, _ConvNd)) or id(module) in heads:
            found |= {f"{name}.{inner}" for inner, _ in module.named_parameters()}
    return found


def left_out(model):
    """The share of all parameters that take AdamW and are not apart, and the largest kinds of them."""
    chosen, aside, sizes = by_name(model), apart(model), Counter()
    for name, p in trained(model).items():
        if name not in chosen and name not in aside:
            sizes[re.sub(r"\.\d+(?=\.)", ".*", name)] += p.numel()
    return sum(sizes.values()) / sum(p.numel() for p in trained(model).values()), sizes.most_common(3)


def complaints(model_type, model):
    found = []
    share, largest = left_out(model)
    if (share > 0.1) != (model_type in EXCEPTIONS):
        found.append(f"{share:.0%} left out: {largest}")
    if by_name(model) != by_type(model):
        found.append(f"names and types disagree: {sorted(by_name(model) ^ by_type(model))[:3]}")
    wrong = [n for n in by_name(model) if re.search(r"bias|rel_pos_[hw]|A_log|conv1d\.weight|norm\.weight", n)]
    if wrong:
        found.append(f"low-rank, but no projection: {wrong[:3]}")
    return [f"{model_type}: {text}" for text in found]


@pytest.fixture(scope="module", autouse=True)
def _offline_and_quiet():
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):
        yield
    transformers.utils.logging.set_verbosity(before)


@pytest.mark.parametrize("model_type", [*PLAIN, *OTHER])
def test_nine_tenths_are_low_rank_by_name_and_by_type_alike(model_type):
    model = build(model_type)
    assert model is not None
    assert not complaints(model_type, model)


@pytest.mark.parametrize("model_type", PLAIN)
def test_in_plain_transformers_it_is_every_linear_layer_of_a_block_but_routers(model_type):
    model, wanted = build(model_type), set()
    for name, module in model.named_modules():
        projection = isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))
        if projection and re.search(r"\.\d+\.", name) and not re.search(r"router|\bgate$", name):
            wanted.add(f"{name}.weight")
    wanted |= {n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n}
    chosen = {n for n in by_name(model) if not re.search(r"projector", n)}
    assert chosen == wanted


CASES = [
    ("mamba2", r"mixer\.(in|out)_proj\.weight", r"conv1d|A_log|dt_bias|norm"),
    ("mamba", r"mixer\.(in|x|dt|out)_proj\.weight", r"conv1d|A_log"),
    ("distilbert", r"[qkv]_lin\.weight|out_lin\.weight|lin[12]\.weight", r"embeddings|vocab_projector"),
    ("wav2vec2", r"intermediate_dense\.weight|output_dense\.weight", r"conv_layers|pos_conv_embed|codevectors"),
    ("rwkv", r"(receptance|output|key|value)\.weight", r"time_|embeddings|^head"),
    ("bamba", r"mamba\.(in|out)_proj\.weight", r"conv1d"),
    ("jetmoe", r"(input|output)_linear\.weight", r"router"),
    ("deberta-v2", r"(query|key|value)_proj\.weight", r"embeddings|LayerNorm"),
    ("qwen3_5", r"linear_attn\.in_proj_(qkv|z)\.weight", r"conv1d|A_log|pos_embed"),
    ("olmo_hybrid", r"g_proj\.weight", r"conv1d|A_log"),
    ("swin", r"query\.weight|dense\.weight|reduction\.weight", r"relative_position_bias_table"),
    ("nemotron_h", r"mixer\.(in|out)_proj\.weight", r"conv1d|A_log"),
    ("recurrent_gemma", r"linear_[xy]\.weight|(input|recurrent)_gate_weight", r"conv_1d|gate_bias"),
    ("llava", r"multi_modal_projector\.linear_[12]\.weight", r"position_embedding|lm_head"),
    ("gpt_oss", r"experts\.(gate_up|down)_proj$", r"_proj_bias|router"),
    ("sam", r"attn\.qkv\.weight", r"rel_pos_[hw]|hypernetworks.*\.bias"),
    ("wav2vec2-bert", r"linear_[qkv]\.weight", r"distance_embedding|pointwise_conv"),
    ("siglip", r"encoder\.layers\.\d+\.mlp\.fc1\.weight", r"head\.attention\.in_proj_weight|head\.mlp"),
    ("xlnet", r"ff\.layer_[12]\.weight", r"rel_attn\.[qkvor]$"),
    ("funnel", r"[qkv]_head\.weight", r"r_kernel|seg_embed"),
    ("deepseek_v3", r"(q_a|q_b|kv_b)_proj\.weight|experts\.gate_up_proj", r"mlp\.gate\.weight|layernorm"),
]


@pytest.mark.parametrize(("model_type", "low_rank", "others"), CASES, ids=[case[0] for case in CASES])
def test_what_a_list_of_names_got_wrong(model_type, low_rank, others):
    model = build(model_type)
    chosen, names = by_type(model), {n for n, _ in model.named_parameters()}
    sought, unsought = ({n for n in names if re.search(p, n)} for p in (low_rank, others))
    assert sought and unsought
    assert sought - unsought <= chosen
    assert not unsought & chosen


def test_the_type_of_a_layer_decides_where_its_name_does_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lookup, self.up = nn.Embedding(9, 8), nn.Linear(8, 16)
            self.smooth = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 16, 16))
            self.pre = PreNorm(nn.Linear(8, 8))

    class PreNorm(nn.Module):  # a norm that wraps what it comes before
        def __init__(self, inner):
            super().__init__()
            self.inner, self.grid = inner, nn.Parameter(torch.zeros(8, 8))

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    names = [n for n, _ in low_rank_parameters(model)]
    assert names == ["blocks.0.up.weight", "blocks.0.pre.inner.weight"]
    assert "blocks.0.lookup.weight" in by_name(model) and layer_kinds(model)["blocks.0.lookup.weight"] == "embedding"


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_model_type_that_transformers_builds():
    found, built = [], 0
    for model_type in CONFIG_MAPPING_NAMES:
        model = build.__wrapped__(model_type)
        if model is not None and trained(model):
            built += 1
            found += complaints(model_type, model)
    assert not found, "\n".join(found)
    assert built > 500
