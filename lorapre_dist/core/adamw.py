"""AdamW on flat pieces, for the parameters that are not low-rank. Elementwise, so no layout matters to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """Settings of one parameter group at one step, as in ``torch.optim.AdamW``."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass
class Vector:
    """State of one parameter's local piece: ``exp_avg`` and ``exp_avg_sq``, both 1-D of the piece's length."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """State by ``torch.optim.AdamW``'s names."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def allocate(numel: int, device: torch.device, dtype: torch.dtype) -> Vector:
    """State of a piece before its first step: zeros."""
    zeros = torch.zeros(numel, device=device, dtype=dtype)
    return Vector(zeros, zeros.clone())


def step(vector: Vector, theta: Tensor, grad: Tensor, hyper: Hyper, block_bytes: int) -> None:
    """One AdamW step of one piece, in place (decoupled weight decay, eps outside the root, as in PyTorch).

    It goes part by part, so that its temporaries are of ``block_bytes`` and not of the piece's size.
    """
    vector.step += 1
    beta1, beta2 = hyper.betas
    dtype = vector.exp_avg.dtype
    size = max(1, block_bytes // vector.exp_avg.element_size())
    for at in range(0, theta.numel(), size):
        part = slice(at, at + size)
        exp_avg, exp_avg_sq = vector.exp_avg[part], vector.exp_avg_sq[part]
        g, wide = grad[part].to(dtype), theta[part].to(dtype)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = (exp_avg_sq / (1 - beta2**vector.step)).sqrt_().add_(hyper.eps)
        wide.mul_(1 - hyper.lr * hyper.weight_decay)
        wide.addcdiv_(exp_avg, denom, value=-hyper.lr / (1 - beta1**vector.step))
        if theta.dtype != dtype:
            theta[part].copy_(wide)
