"""The Triton kernel of AdamW's step of a flat piece: one launch, and each number read and written once.

What it computes is in :mod:`lorapre_dist.core.rules.adamw`, operation by operation.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..guard import ADAMW_LARGEST, Go

BLOCK = 1024


@triton.jit
def adamw_block(  # type: ignore[no-untyped-def]
    theta, grad, exp_avg, exp_avg_sq, taken, go, numbers, count, beta1, beta2, log1, log2, eps, largest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``BLOCK`` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    step = tl.load(go).to(tl.float32)
    number = tl.maximum(tl.load(taken), 1.0)  # fp64
    bias1 = (1.0 - tl.exp(number * log1)).to(tl.float32)
    bias2 = (1.0 - tl.exp(number * log2)).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(g == g, tl.minimum(tl.maximum(g, -largest), largest), 0.0)
    m = tl.load(exp_avg + at, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
    m += (step * (1.0 - beta1)) * (g - m)
    v += (step * (1.0 - beta2)) * (g * g - v)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    kept = tl.load(theta + at, mask=inside, other=0.0).to(tl.float32) * tl.load(numbers)
    update = (tl.load(numbers + 1) / bias1) * (m / (tl.sqrt_rn(v / bias2) + eps))
    tl.store(theta + at, (kept - update).to(theta.dtype.element_ty), mask=inside)


def step(
    theta: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    taken: Tensor,
    go: Go,
    numbers: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Step ``theta``, in place; all are 1-D of one length.

    Args:
        taken: number of updates, this one with them (0-d, fp64).
        numbers: what weights are multiplied by, and the learning rate, which is 0 where no step is taken (2).
    """
    if theta.numel():
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
        adamw_block[(triton.cdiv(theta.numel(), BLOCK),)](
            theta, grad, *moments, taken, go.value, numbers, theta.numel(), *betas, *logs,
            max(eps, torch.finfo(torch.float32).tiny), ADAMW_LARGEST, BLOCK=BLOCK,
        )  # fmt: skip
