"""AdamW's moments in 8 bits an element, with a scale for each row of the parameter: its largest element.

    exp_avg_8bit      m = sign (c / 127)^2 largest |m| of the row,    c from -127 to 127
    exp_avg_sq_8bit   v = (c / 255)^4 largest v of the row,           c from 0 to 255

Both have the square root of ``|m|``, and of ``sqrt(v)``, in equal steps, so that small numbers of a row lie closer
together than large ones: elements down to 6e-5 of the largest ``|m|``, and 1.5e-5 of the largest ``sqrt(v)``, are told
apart. A ``v`` that is not 0 is never kept as 0, by which an update would be divided, but as the smallest beyond it.

Between two numbers that can be kept one is taken at random, the nearer one more often, so that on average nothing is
lost: by ``1 - beta2`` a step, a thousandth, no number of 8 bits would move to the nearest other one. What is rounded
once (a state that is loaded) goes to the nearest. A row is a token's embedding: ranks that hold parts of it agree on
its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M, _V = 127, 255


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers of codes (int8: of ``m``, uint8: of ``v``), in the type of ``scale``, which broadcasts."""
    root = codes.to(scale.dtype)
    if codes.dtype == torch.int8:
        return root.mul_(root.abs()).mul_(scale / _M**2)
    return root.div_(_V).square_().square_().mul_(scale)


def encoded(wide: Tensor, scale: Tensor, dtype: torch.dtype, random: Tensor | None = None) -> Tensor:
    """Codes of ``dtype`` (int8 of ``m``, uint8 of ``v``).

    Args:
        wide: what is kept, at most ``scale``.
        random: 16 bits for each element, from 0 to 65535; None: to the nearest number.
    """
    signed = dtype == torch.int8
    most, power = (_M, 2) if signed else (_V, 4)
    x = (wide / scale.clamp_min(torch.finfo(wide.dtype).tiny)).abs_()
    low = (x.sqrt() if signed else x.sqrt().sqrt_()).mul_(most).floor_().clamp_(max=most - 1)
    below, above = low.square(), (low + 1).square_()
    if not signed:
        below, above = below.square_(), above.square_()
    up = x.mul_(most**power).sub_(below).div_(above.sub_(below))
    threshold = 0.5 if random is None else random.to(wide.dtype).add_(0.5).mul_(2.0**-16)
    code = low.add_(up > threshold)
    if signed:
        return code.copysign_(wide).to(dtype)
    return torch.maximum(code, wide > 0).to(dtype)
