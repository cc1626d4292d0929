from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorapre_dist.bench import tracking
from lorapre_dist.bench.__main__ import main


class Config:
    hidden_size = 8


class Small(nn.Module):
    """One block with a matrix 8 x 6, on which gradients of rank 1 come in."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(6, 8, bias=False)})])
        self.config = Config()


def shadows(*names):
    torch.manual_seed(0)
    model = Small()
    found = [tracking.Shadow.of(name, copy.deepcopy(model)) for name in ("adamw", *names)]
    for t in range(12):
        g = torch.outer(torch.linspace(1, 2, 8), torch.linspace(-1, 1, 6)) * (1 + t % 3)
        for shadow in found:
            shadow.step([g])
    for shadow in found[1:]:
        shadow.sample(found[0])
    return found


def test_an_optimizer_is_at_one_with_itself():
    pytest.importorskip("pytorch_optimizer")
    _, same, other = shadows("adamw", "lion")
    assert same.samples[0][:4] == pytest.approx((1, 1, 1, 1), rel=1e-5)
    # Lion's elements are all of size 1, AdamW's of about 1; signs agree.
    cosine, size, *_ = other.samples[0]
    assert cosine > 0.99 and 0.8 < size < 1.3


def test_ours_follows_gradients_of_its_rank():
    _, ours = shadows("lorapre-8+rank=2+residual=0.3")
    cosine, size, over, of, _ = ours.samples[0]
    assert cosine > 0.99 and 0.9 < size < 1.1 and over > 0.99 and 0.9 < of < 1.1


def test_elements_above_one_are_counted():
    base = tracking.Shadow.of("adamw", Small())
    other = tracking.Shadow.of("adamw", Small())
    base.step([torch.ones(8, 6)])
    other.step([torch.ones(8, 6)])
    other.update[:12] *= -2
    other.sample(base)
    assert other.samples[0][4] == 250


def test_compared():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert tracking.compared(x, 2 * y) == pytest.approx((0.96, 0.5))


def test_bad_input_is_one_line(capsys):
    assert main(["tracking", "--steps", "10", "--window", "6"]) == 2
    assert "error: --steps 10, --window 6: at least two windows are needed" in capsys.readouterr().err
