"""Where both projections are the identity, factored momenta are the full ones, and the optimizers are PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist.optimizers import OPTIMIZERS

N, STEPS = 6, 10


def forced(monkeypatch, name, **options):
    """An optimizer that factors a 6 x 6 matrix at rank 6, in fp64, with next to no damping."""
    cls = OPTIMIZERS[name]
    monkeypatch.setattr(cls, "_is_low_rank", lambda self, name, shape, config: True)
    p = torch.nn.Parameter(start())
    return p, cls([("q_proj.weight", p)], rank=N, damping=1e-15, **options)


def start():
    return torch.randn(N, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def train(p, optimizer):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        p.grad = torch.randn(N, N, generator=generator, dtype=torch.float64) + p.detach()
        optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_follows_torch(monkeypatch, nesterov, adjust_lr_fn):
    """torch's own code, but for its bf16 iterations, which run in fp64 here: trajectories agree to 1e-7.

    Damping of 1e-15 leaves rounding in the r x r solves, and the iterations enlarge small singular values 485-fold.
    """
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    p, optimizer = forced(monkeypatch, "LoRAPreMuon", **options)
    q = torch.nn.Parameter(start())
    theirs = torch.optim.Muon([q], **options)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.double().clone())
    train(p, optimizer)
    train(q, theirs)
    assert float((p.detach() - start()).norm()) > 0.1
    assert torch.allclose(p, q, rtol=1e-7, atol=1e-7), float((p - q).detach().abs().max())


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_follows_torch(monkeypatch, nesterov):
    p, optimizer = forced(monkeypatch, "LoRAPreSGD", lr=0.02, nesterov=nesterov)
    q = torch.nn.Parameter(start())
    train(p, optimizer)
    train(q, torch.optim.SGD([q], lr=0.02, momentum=0.9, nesterov=nesterov))
    assert torch.allclose(p, q, rtol=1e-7, atol=1e-7)


def test_lion_has_the_full_momentum(monkeypatch):
    """The update is sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g."""
    p, optimizer = forced(monkeypatch, "LoRAPreLion", lr=0.01, weight_decay=0.1)
    train(p, optimizer)
    q, m = start(), torch.zeros(N, N, dtype=torch.float64)
    for step in range(STEPS):
        g = torch.randn(N, N, generator=torch.Generator().manual_seed(step), dtype=torch.float64) + q
        q = (1 - 0.01 * 0.1) * q - 0.01 * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
    state = optimizer.factors()["q_proj.weight"]
    assert torch.allclose(state["m_B"] @ state["m_A"], m, rtol=1e-7, atol=1e-9)
    assert torch.allclose(p, q, rtol=1e-7, atol=1e-9)


def test_adam_has_adamws_first_moment(monkeypatch):
    p, optimizer = forced(monkeypatch, "LoRAPre", lr=0.0)
    q = torch.nn.Parameter(start())
    theirs = torch.optim.AdamW([q], lr=0.0)
    train(p, optimizer)
    train(q, theirs)
    state = optimizer.factors()["q_proj.weight"]
    exp_avg = theirs.state[q]["exp_avg"]
    assert torch.allclose(state["m_B"] @ state["m_A"], exp_avg, rtol=1e-7, atol=1e-9)
