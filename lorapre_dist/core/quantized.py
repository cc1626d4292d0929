"""Numbers in fewer bits: vectors of r numbers in bf16, or in 8 bits with a scale of their own (``forms.py``).

A step rounds stochastically, up with the probability that makes it right on average: the second moment's factors move
by ``1 - beta2^(1/4)`` of themselves a step, 0.00025, where two numbers of bf16 are 0.004 apart, so that the nearest one
would be the old one for ever. The random bits are those of ``noise.py``, so all layouts round alike. What is rounded
once (a state that is loaded) goes to the nearest number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import forms, noise

DTYPES = {"bf16": torch.bfloat16, "8bit": torch.int8}
_FORMS = {dtype: form for form, dtype in DTYPES.items()}


def form_of(kept: Tensor) -> str:
    """The form of a factor, which its type tells."""
    return _FORMS.get(kept.dtype, "fp32")


def rank_of(kept: Tensor, dim: int) -> int:
    """Numbers in each vector of a factor, which lie along ``dim``."""
    return kept.shape[dim] - (forms.SCALE if kept.dtype == torch.int8 else 0)


def widened(kept: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """A factor as a step reckons with it; itself where it is kept so. Its vectors lie along ``dim``: -1 or -2."""
    if kept.dtype == torch.bfloat16:
        return kept.to(dtype)
    if kept.dtype != torch.int8:
        return kept
    codes, scale = kept.split([rank_of(kept, dim), forms.SCALE], dim)
    return codes.to(dtype).mul_(_viewed(scale, dim, torch.float32))


def rounded(wide: Tensor, form: str, dim: int, bits: Tensor | None = None) -> Tensor:
    """A factor in another form; itself in fp32.

    Args:
        bits: 32 random ones for each element, which are overwritten; None: to the nearest number.
    """
    if form == "fp32":
        return wide
    wide = wide.float()
    if form == "bf16":
        if bits is None:
            return wide.bfloat16()
        # Of the 16 bits that are cut off those that carry are as many as their value says.
        raised = wide.contiguous().view(torch.int32) + noise.upper(bits)
        return raised.bitwise_and_(-0x10000).view(torch.float32).bfloat16()
    scale = wide.abs().amax(dim, keepdim=True).div_(127)
    up = 0.5 if bits is None else bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)
    codes = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)).add_(up).floor_().clamp_(-127, 127)
    return torch.cat([codes.to(torch.int8), _viewed(scale, dim, torch.int8)], dim)


def _viewed(scales: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The vectors' scales as bytes along ``dim``, or the other way round."""
    apart = scales.movedim(dim, -1).clone(memory_format=torch.contiguous_format)  # a view needs strides of 1
    return apart.view(dtype).movedim(-1, dim)


def converted(kept: Tensor, like: Tensor, dim: int) -> Tensor:
    """A factor in the form of another, each number the nearest one; itself if it has that form."""
    if form_of(kept) == form_of(like):
        return kept
    return rounded(widened(kept, dim, torch.float32), form_of(like), dim)


def random_bits(words: Tensor, first: int, count: int, r: int, dim: int) -> Tensor:
    """32 random bits for each element of the vectors ``[first, first + count)`` of k factors (int32).

    k x count x r with ``dim`` -1, k x r x count with -2. An element's are a function of its vector and place alone.

    Args:
        words: k x 2, of :func:`lorapre_dist.core.noise.draw`.
    """
    index = noise.places((first, first + count), (0, r), r, words.device)
    index = index if dim == -1 else index.T
    return noise.bits(index.reshape(-1), words).view(-1, *index.shape)
