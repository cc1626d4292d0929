"""Resuming what was saved with other parameters low-rank: as it was, or one line that says how to have it so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, checkpoint
from lorapre_dist.checkpoint import CheckpointError

from .toy import assert_same


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.in_proj, self.small = nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, 3)
        self.input_linear = nn.Parameter(torch.randn(2, 8, 9))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(11, 8), nn.ModuleList([Block(), Block()])


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def former(monkeypatch):
    """A model and an optimizer of a version that chose by a list of names, after a step."""
    with monkeypatch.context() as patch:
        patch.setattr("lorapre_dist.config.param_groups.projects", lambda name: ".q_proj." in name)
        model = Net()
        optimizer = LoRAPre(model, rank=4)
        step(model, optimizer, 0)
    assert set(optimizer.factors()) == {"layers.0.q_proj.weight", "layers.1.q_proj.weight"}
    return model, optimizer


def test_a_checkpoint_of_another_selection_says_how_to_have_it(monkeypatch, tmp_path):
    model, optimizer = former(monkeypatch)
    checkpoint.save(model, optimizer, tmp_path, "one")
    other = Net()
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        checkpoint.load(other, LoRAPre(other, rank=4), tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "one") in text and "\n" not in text
    assert "layers.0.in_proj.weight and 3 more: kind was adamw, is lorapre" in text  # the stacks among them
    assert text.endswith('; target_modules=["q_proj"] selects what was low-rank in it')
    resumed = LoRAPre(other, rank=4, target_modules=["q_proj"])
    checkpoint.load(other, resumed, tmp_path)
    assert resumed.param_groups[0]["target_modules"] == ("q_proj",)  # and not what was saved: None
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    assert_same(model, other)
    resumed.load_state_dict(resumed.state_dict())
    checkpoint.save(other, resumed, tmp_path, "two")
    third = Net()
    checkpoint.load(third, LoRAPre(third, rank=4, target_modules=["q_proj"]), tmp_path)


def test_a_state_dict_of_another_selection(monkeypatch):
    model, optimizer = former(monkeypatch)
    saved = optimizer.state_dict()
    with pytest.raises(ConfigError, match=r"layers\.0\.in_proj\.weight: m_B was missing") as caught:
        LoRAPre(Net(), rank=4).load_state_dict(saved)
    assert "\n" not in str(caught.value)
    other = Net()
    other.load_state_dict(model.state_dict())
    resumed = LoRAPre(other, rank=4, target_modules=["q_proj"])
    resumed.load_state_dict(saved)
    step(model, optimizer, 1)
    step(other, resumed, 1)
    assert_same(model, other)


def test_another_rank_is_one_line_and_offers_what_there_is(tmp_path):
    model = Net()
    optimizer = LoRAPre(model, rank=4)
    checkpoint.save(model, optimizer, tmp_path, "one")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(model, LoRAPre(model, rank=5), tmp_path)
    hint = "(resize_rank=True, or a program's --resize_rank, adapts it)"
    wanted = f"layers.0.in_proj.weight and 7 more: rank was 4, is 5 {hint}"
    assert str(caught.value).endswith(f"does not fit: {wanted}")
