"""A small model of every kind of parameter, and its training by the optimizer and by the dense reference."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lorapre_dist import LoRAPreConfig, reference
from lorapre_dist.core.factors import initial_A

STEPS = 20
# fp64: 20 steps of sums in another order, amplified by the damped solves.
FP64 = 1e-10
# fp32: the contract of the project.
FP32 = 1e-5
STABLE = {"rank": 4, "lr": 0.01, "scale": 0.5}
PAPER = {"rank": 3, "lr": 0.001, "variant": "paper", "damping": 1e-3}


class Toy(nn.Module):
    """Embedding, norm, biases, a head, and four matrices of which one is too small for rank 4; tall and wide."""

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.q_proj = nn.Linear(8, 12, bias=True)
        self.k_proj = nn.Linear(12, 3, bias=False)
        self.up_proj = nn.Linear(3, 17, bias=False)
        self.down_proj = nn.Linear(17, 8, bias=True)
        self.mlp = nn.ParameterDict({"w": nn.Parameter(torch.zeros(8, 6)), "scale": nn.Parameter(torch.zeros(8))})
        self.head = nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))
        x = self.down_proj(torch.tanh(self.up_proj(self.k_proj(torch.tanh(self.q_proj(x))))))
        return self.head((x * self.mlp["scale"].exp()) @ self.mlp["w"])


LOW_RANK = {"q_proj.weight", "down_proj.weight", "mlp.w"}  # min(p, q) > 4: 12 x 8, 8 x 17, 8 x 6


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (6, 5), generator=generator)
    targets = torch.randint(5, (6, 5), generator=generator)
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).double(), targets.flatten())


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


class Reference:
    """The same training with the dense reference: one state per parameter, fp64, stepped one by one."""

    def __init__(self, named, dtype=torch.float64, **options):
        self.named, self.dtype = dict(named), dtype
        self.config = LoRAPreConfig(**options)
        self.states, self.overrides = {}, {}

    def step(self):
        for name, p in self.named.items():
            if p.grad is None:
                continue
            config = replace(self.config, **self.overrides.get(name, {}))
            matrix = name in LOW_RANK and config.rank > 0
            if name not in self.states:
                self.states[name] = self._initial(name, p, config, matrix)
            update = reference.lorapre_adam_step if matrix else reference.adamw_step
            update(p.data, p.grad.to(p.dtype), self.states[name], config)

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None

    def _initial(self, name, p, config, matrix):
        if matrix:
            m_A, v_A = (
                initial_A(name, moment, r, p.shape[1], config.init_std, config.seed)
                for moment, r in (("m", config.rank), ("v", config.resolved_rank_v))
            )
            return reference.init_state(tuple(p.shape), config, m_A, v_A)
        zeros = torch.zeros_like(p.data)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros((), dtype=torch.int64)}


def assert_matches(model, wanted, tolerance):
    named = dict(wanted.named_parameters())
    for name, p in model.named_parameters():
        want = named[name].detach().double()
        error = float((p.detach().double() - want).norm() / want.norm())
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_same(model, other):
    """Bit for bit."""
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def state_tensors(optimizer):
    return {(b.piece.name, k): t for b in optimizer.bound() for k, t in b.state.tensors().items()}


def train_three_rows(model, optimizer):
    """Five steps on the embedding's first three tokens."""
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.tensor([[0, 1, 2]])).square().sum().backward()
        optimizer.step()
