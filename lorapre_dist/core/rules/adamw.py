"""AdamW on flat pieces, for the parameters that are not low-rank. Elementwise, so no layout matters to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import kernels, spec
from ..guard import ADAMW_LARGEST, Counted, Go, broadcast
from ..rounding import Rounding


@dataclass(frozen=True)
class Hyper:
    """Settings of one parameter group at one step, as in ``torch.optim.AdamW``; ``lr`` may be 0-d on the device."""

    lr: Any
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass
class Vector(Counted):
    """State of one parameter's local piece: ``exp_avg`` and ``exp_avg_sq``, both 1-D of the piece's length.

    ``rounding`` is how the weights are kept.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    taken: Tensor
    rounding: Rounding = field(default_factory=Rounding)

    @property
    def dtype(self) -> torch.dtype:
        """The type that a step reckons in."""
        return self.exp_avg.dtype

    def tensors(self) -> dict[str, Tensor]:
        """State by ``torch.optim.AdamW``'s names, and that of ``rounding``."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, **self.rounding.tensors()}


def allocate(numel: int, device: torch.device, dtype: torch.dtype, rounding: Rounding) -> Vector:
    """State of a piece before its first step: zeros."""
    specs = spec.of_vector(str(dtype).removeprefix("torch."))
    zeros = {key: torch.zeros(s.shape(numel), device=device, dtype=getattr(torch, s.dtype)) for key, s in specs.items()}
    return Vector(**zeros, taken=torch.zeros((), device=device, dtype=torch.float64), rounding=rounding)


def bias(decay: float, taken: Tensor, go: Go, dtype: torch.dtype) -> Any:
    """``1 - decay^t``, of a first step where none has been taken: a number where the host knows it."""
    if go.sure and taken.device.type == "cpu":
        alone = taken.numel() == 1
        least, most = (float(taken),) * 2 if alone else (float(taken.min()), float(taken.max()))
        if least == most:
            return -math.expm1(max(1.0, most) * math.log(decay)) if decay else 1.0
    return (1 - torch.pow(decay, taken.clamp_min(1))).to(dtype)


@dataclass(frozen=True)
class Pace:
    """What one step needs of the settings: numbers where the host knows them, else 0-d, or of each matrix of a stack.

    Where no step is taken moments and weights keep their values.

    Attributes:
        decay: what weights are multiplied by.
        fresh, fresh_sq: weight of the gradient, and of its square, in the moments.
        bias2: ``1 - beta2^t``.
        slow: ``(1 - beta1^t) / lr``.
        floor: what is added to the root of ``exp_avg_sq``.
        clean: whether every gradient is known to be finite.
    """

    decay: Any
    fresh: Any
    fresh_sq: Any
    bias2: Any
    slow: Tensor
    floor: float
    clean: bool


def pace(hyper: Hyper, taken: Tensor, go: Go, dtype: torch.dtype, dims: int = 0) -> Pace:
    """Of a step, ``taken`` being its number (0-d, of a stack k); ``dims`` are those of each piece."""
    beta1, beta2 = hyper.betas
    bias1, bias2 = (broadcast(bias(beta, taken, go, dtype), dims) for beta in hyper.betas)
    return Pace(
        decay=go.keep(1 - hyper.lr * hyper.weight_decay, dtype),
        fresh=go.of(1 - beta1, dtype),
        fresh_sq=go.of(1 - beta2, dtype),
        bias2=bias2,
        # theta -= lr / bias1 * exp_avg / denom, as one quotient: by infinity where no step is taken.
        slow=bias1 / torch.as_tensor(go.of(hyper.lr, dtype), dtype=dtype, device=go.value.device),
        floor=max(hyper.eps, torch.finfo(dtype).tiny),
        clean=go.sure,
    )


def average(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, at: Pace) -> None:
    """Take a gradient into the moments, in place."""
    g = g.clamp(-ADAMW_LARGEST, ADAMW_LARGEST)
    if not at.clean:
        g = g.nan_to_num_(0.0)
    exp_avg.lerp_(g, at.fresh)
    exp_avg_sq.lerp_(g.square_(), at.fresh_sq)


def update(theta: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, at: Pace) -> None:
    """Step weights, in place, by the moments after :func:`average`."""
    denom = (exp_avg_sq / at.bias2).sqrt_().add_(at.floor).mul_(at.slow)
    theta.mul_(at.decay).addcdiv_(exp_avg, denom, value=-1)


def step(
    vector: Vector, theta: Tensor, grad: Tensor, hyper: Hyper, block_bytes: int, go: Go, option: str = "eager"
) -> None:
    """One AdamW step of one piece, in place (decoupled weight decay, eps outside the root, as in PyTorch).

    It goes part by part, so that its temporaries are of ``block_bytes`` and not of the piece's size; in one kernel
    without any where the option ``kernels`` comes to that.
    """
    vector.taken.add_(go.value)
    dtype = vector.exp_avg.dtype
    in_kernel = kernels.chosen(option, vector.exp_avg) == "triton"
    at_pace = None if in_kernel else pace(hyper, vector.taken, go, dtype)
    to_nearest = in_kernel and type(vector.rounding) is Rounding  # which the kernel does itself
    size = max(1, theta.numel() if to_nearest else block_bytes // vector.exp_avg.element_size())
    for at in range(0, theta.numel(), size):
        part = slice(at, at + size)
        weights, moments = theta[part], (vector.exp_avg[part], vector.exp_avg_sq[part])
        if at_pace is None:
            wide = weights if to_nearest else vector.rounding.wide(weights, at, dtype)
            _in_kernel(wide, grad[part], moments, vector.taken, hyper, go)
        else:
            average(grad[part].to(dtype), *moments, at_pace)
            wide = vector.rounding.wide(weights, at, dtype)
            update(wide, *moments, at_pace)
        vector.rounding.put(wide, weights, at)


def _in_kernel(
    theta: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], taken: Tensor, hyper: Hyper, go: Go
) -> None:
    """:func:`average` and :func:`update`."""
    from ..kernels import vector

    dtype = moments[0].dtype
    numbers = go.pair(go.keep(1 - hyper.lr * hyper.weight_decay, dtype), go.of(hyper.lr, dtype), moments[0])
    vector.step(theta, grad, moments, taken, go, numbers, hyper.betas, hyper.eps)
