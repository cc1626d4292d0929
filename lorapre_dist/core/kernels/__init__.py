"""The elementwise end of a row block, in three forms that give the same: eager, compiled, and one Triton kernel.

    m = gain g + left A    d = sqrt((low vA)^2 + second (s g)^2) + floor    theta <- decay theta - rate clip(m / d)

``left`` and ``low`` hold the factors' rows, already multiplied by what their rows are multiplied by; ``s`` is the size
by which squares are scaled (:class:`lorapre_dist.core.guard.Size`). The same with ``second`` 0 and without the root is
Adafactor's.

    eager     every operation a pass over a block that fits a cache
    compile   ``torch.compile`` makes one pass of what follows the two products, which are written and read back
    triton    one kernel: tiles of both products are formed and used on chip (``tile.py``); with it go kernels for what
              is done to a block's rows before (``rows.py``), and one for AdamW's other parameters (``vector.py``)
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from ..linalg import addmm, mm
from ..workspace import Workspace
from .update import Update, numbers


def chosen(option: str, like: Tensor) -> str:
    """The form that a tensor's device and dtype take under the option ``kernels``; see :func:`problem`."""
    if option == "auto":
        return "triton" if like.is_cuda and like.dtype == torch.float32 and has_triton() else "eager"
    return option


def problem(option: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why state of this type on this device cannot be stepped under the option ``kernels``; None if it can be."""
    if option != "triton":
        return None
    if not has_triton():
        return "kernels='triton': triton is not installed; install it, or use 'auto', 'eager' or 'compile'"
    if dtype == torch.float32 and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return (
        f"kernels='triton': needs fp32 state on a CUDA device, this is {dtype} on {device.type}; "
        "use 'auto', 'eager' or 'compile'"
    )


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def apply(update: Update, form: str, workspace: Workspace) -> None:
    """Update theta by one row block."""
    if form == "triton":
        from . import tile

        tile.apply(update)
        return
    m, w = (workspace.take(label, update.g.shape, update.A) for label in "mw")
    if form == "compile":
        mm(update.left, update.A, out=m)
        mm(update.low, update.vA, out=w)
        _compiled()(*_tensors(update, m, w), update.second, update.bound)
        return
    if update.second:
        mm(update.low, update.vA, out=w)
        scaled = update.size.scaled(update.g, out=m)
        # The smallest number keeps the root of what is 0 from a slow path of a CPU's library, and from the quotient.
        torch.addcmul(_least(w.dtype, w.device), w, w, out=w).addcmul_(scaled, scaled, value=update.second).sqrt_()
        w.add_(update.floor)
    else:
        torch.addcmul(update.floor, update.low, update.vA, out=w)
    addmm(torch.mul(update.g, update.gain, out=m), update.left, update.A, beta=1)
    subtract(update.theta, m, w, update.bound, update.decay, update.rate)


def subtract(theta: Tensor, m: Tensor, denom: Tensor | None, bound: float, decay: Any, rate: Any) -> None:
    """``theta <- decay theta - rate clip(m / denom)``, in place; ``m`` is overwritten. Without ``denom`` of ``m``."""
    wide = theta if theta.dtype == m.dtype else theta.to(m.dtype)
    if isinstance(decay, Tensor) or decay != 1:
        wide.mul_(decay)
    if denom is not None:
        m.div_(denom)
    if math.isfinite(bound):
        m.clamp_(-bound, bound)
    if isinstance(rate, Tensor):
        wide.addcmul_(m, rate, value=-1)
    else:
        wide.add_(m, alpha=-rate)
    if wide is not theta:
        theta.copy_(wide)


@functools.cache
def _least(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The smallest normal number, 0-d."""
    return torch.full((), torch.finfo(dtype).tiny, dtype=dtype, device=device)


def _tensors(update: Update, m: Tensor, w: Tensor) -> tuple[Any, ...]:
    inverse = update.size.inverse
    return update.theta, update.g, m, w, update.gain, update.floor, inverse, numbers(update)


def _end(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    w: Tensor,
    gain: Tensor,
    floor: Tensor,
    inverse: Tensor | None,
    numbers: Tensor,
    second: float,
    bound: float,
) -> None:
    """What follows the products ``m`` and ``w``, as one expression: one pass where it is compiled."""
    if second:
        scaled = g if inverse is None else g * inverse
        w = (w * w + second * (scaled * scaled) + torch.finfo(w.dtype).tiny).sqrt()
    quotient = (m + gain * g) / (w + floor)
    if bound != math.inf:
        quotient = quotient.clamp(-bound, bound)
    theta.copy_(theta.to(m.dtype) * numbers[0] - numbers[1] * quotient)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_end, dynamic=True)
