"""The row of the start table that says what is low-rank and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre_dist import LoRAPre
from lorapre_dist.training.engines import selection
from tests.launch.conftest import TINY_LLAMA


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))


def share(model, part):
    return sum(p.numel() for n, p in model.named_parameters() if part(n)) / model.num_parameters()


def test_of_a_llama_all_but_the_norms_and_what_is_apart(model):
    (row,) = selection.rows(model, LoRAPre(model, rank=4))
    low_rank, apart = share(model, lambda n: "_proj" in n), share(model, lambda n: "embed" in n or "lm_head" in n)
    start = f"low-rank   {low_rank:.1%} of the trained parameters; AdamW: embeddings and heads {apart:.1%}, "
    assert row.startswith(start)
    norms = f"{1 - low_rank - apart:.1%}"
    assert row.endswith(f", {norms} else: norms and biases {norms}")


def test_what_is_left_out_is_named_and_warned_of(model):
    row, warning = selection.rows(model, LoRAPre(model, rank=4, target_modules=["self_attn"]))
    mlp = share(model, lambda n: "mlp" in n)
    assert f"model.layers.*.mlp.up_proj.weight {mlp / 3:.1%}" in row
    assert warning.startswith("warning    ") and "optimizer.params.target_modules" in warning
    assert f"{share(model, lambda n: 'mlp' in n or 'norm' in n):.0%} of the trained parameters" in warning


def test_frozen_parameters_and_other_optimizers_do_not_count(model):
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    (row,) = selection.rows(model, LoRAPre(model, rank=4))
    assert row == "low-rank   100.0% of the trained parameters; AdamW: embeddings and heads 0.0%"
    assert selection.rows(model, torch.optim.AdamW(model.parameters())) == []


def test_shapes_are_known_under_zero_init():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 9, bias=False)]), "embed": nn.Embedding(9, 8)})
    model["layers"].append(nn.ModuleDict({"up": nn.Linear(8, 9, bias=False)}))
    optimizer = LoRAPre(model, rank=4)
    for p in model.parameters():
        p.ds_shape = p.shape
        p.data = torch.empty(0)
    row, _ = selection.rows(model, optimizer)
    assert row.startswith("low-rank   33.3%") and "33.3% else: layers.*.weight 33.3%" in row
