"""What the elementwise end of a row block reads, whatever form does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..guard import Go, Size


@dataclass(frozen=True)
class Update:
    """What the elementwise end of one row block reads; all of it but ``numbers`` has the stack's dimension k first.

    Attributes:
        theta: k x n x c, updated in place.
        grad: k x n x c, as it came; ``g`` is the same in the state's dtype, without what counts as 0.
        left, A: k x n x r and k x r x c.
        low, vA: k x n x s and k x s x c, whose product is not negative.
        gain, floor: k x n x 1.
        second: weight of ``g^2`` in the second moment; 0: there is no root to take, the product (of s = 1) is it.
        bound: of each element of the quotient; infinite: none.
        decay, rate: numbers, or 0-d tensors on the device.
        go: of the step, which keeps both on the device.
    """

    theta: Tensor
    grad: Tensor
    g: Tensor
    left: Tensor
    A: Tensor
    low: Tensor
    vA: Tensor
    gain: Tensor
    floor: Tensor
    size: Size
    second: float
    bound: float
    decay: Any
    rate: Any
    go: Go


def numbers(update: Update) -> Tensor:
    """``decay`` and ``rate`` on the device: a change of the learning rate compiles nothing anew."""
    return update.go.pair(update.decay, update.rate, update.A)
