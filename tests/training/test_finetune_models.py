"""LoRA adapters, and the model folder that fine-tuning leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorapre_dist.config.param_groups import is_low_rank
from lorapre_dist.training.data.tokenizer import train_bpe
from lorapre_dist.training.finetune.models import add_adapters, gathered, save_model

ADAPTERS = SimpleNamespace(model="m", lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, seed=0)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=tied, use_cache=False, **SHAPE))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, use_cache=False))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_adapters_are_on_the_matrices_that_would_be_low_rank(build):
    plain, adapted, again = build(), build(), build()
    wanted = {n for n, p in plain.named_parameters() if is_low_rank(n, p.shape, 4, 1, None)}
    for model in (adapted, again):
        add_adapters(model, ADAPTERS)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {n.split(".lora_")[0] + ".weight" for n in trained} == wanted
    assert len(trained) == 2 * len(wanted)
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in trained.items())
    assert not any("lora_" in n for n, _ in gathered(adapted))


@pytest.mark.parametrize("build", [llama, lambda: llama(tied=True), gpt2])
def test_the_saved_model_computes_what_the_adapted_one_does(build, tmp_path: Path):
    model = build().eval()
    add_adapters(model, ADAPTERS)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.arange(20).view(2, 10)
    wanted = model(input_ids=tokens).logits
    assert not torch.allclose(wanted, build().eval()(input_ids=tokens).logits, atol=1e-2)

    tokenizer = train_bpe(["some text"], 270)
    for _ in range(2):  # also over an earlier one
        save_model(model, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert torch.allclose(loaded.eval()(input_ids=tokens).logits, wanted, atol=1e-5)
    assert loaded.config.use_cache
    assert not model.config.use_cache
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == tokenizer.eos_token
