"""The optimizer that runs a dense rule on every matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Tensor]


class Rule(Protocol):
    """A relative's rule for one p x q matrix; what it is set to are attributes of its own."""

    def begin(self, theta: Tensor, g: Tensor) -> State:
        """State before the first step, whose gradient is ``g (p, q)``."""

    def step(self, theta: Tensor, g: Tensor, state: State, lr: float, t: int) -> None:
        """Step ``theta (p, q)`` and ``state`` in place; ``t`` counts from 1."""


class Dense(Optimizer):
    """Steps each parameter, a matrix, by ``rule``."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, rule: Rule) -> None:
        super().__init__(params, {"lr": lr})
        self.rule, self.t = rule, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        self.t += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p].update(self.rule.begin(p, p.grad))
                self.rule.step(p, p.grad, self.state[p], group["lr"], self.t)
