"""How weights that are kept in 16 bits take a step in 32: what becomes of the bits that they have no room for.

A step widens a part of the weights, changes it and puts it back; one of these stands between:

    Rounding    in the type of the arithmetic nothing is lost; otherwise to the nearest number ("master")
    Stochastic  up or down at random, in proportion, so that on average nothing is lost ("stochastic")
    Kahan       to the nearest, and what is lost is kept beside it in 16 bits more ("kahan")

fp32 has the exponent of bf16 and 16 more bits of significand, so both work on an fp32 number's bits as on an integer:
its upper half is the bf16 weight. The random bits are those of ``noise.py``: every layout draws the same ones. A weight
that a step leaves as it is (because the step is skipped) keeps all its bits in each of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import noise

#: Key of what :class:`Kahan` keeps, among the tensors of a parameter's state.
COMPENSATION = "compensation"

_UPPER, _HALF = -(1 << 16), 1 << 15  # the upper 16 bits of an int32; half of what its lower ones hold


class Rounding:
    """To the nearest number; nothing is rounded where the weights are of the arithmetic's type."""

    def wide(self, theta: Tensor, at: int, dtype: torch.dtype) -> Tensor:
        """Some weights in ``dtype``, to be changed in place: themselves where they are of it.

        Args:
            theta: k x n x c of a stack, or n: consecutive weights of each piece.
            at: where they begin in the piece.
        """
        return theta if theta.dtype == dtype else theta.to(dtype)

    def put(self, wide: Tensor, theta: Tensor, at: int) -> None:
        """Let ``theta`` be what :meth:`wide` gave, after its change; ``wide`` is of no use any more."""
        if wide is not theta:
            theta.copy_(wide)

    def tensors(self) -> dict[str, Tensor]:
        """State by name."""
        return {}


@dataclass
class Stochastic(Rounding):
    """Up with the probability of what is cut off: unbiased, without state.

    Attributes:
        key: of seed and name (0-d, int64).
        start: place of the piece's first element in the whole parameter, in row-major order.
        width, stride: elements of a row of the piece, and of the parameter, where the piece is split by columns; the
            same number where it is a run.
        phase: of such a piece, elements of its first row that it lacks; ``start`` is that of the row's then.
        keys: of the step, by :func:`draw`: 2, of a stack k x 2, int32.
    """

    key: Tensor
    start: int
    width: int = 1
    stride: int = 1
    keys: Any = None
    phase: int = 0

    def put(self, wide: Tensor, theta: Tensor, at: int) -> None:
        """Rounded at random: the upper half, after adding 16 random bits to the lower one."""
        random = self.random(at, theta.numel() if theta.ndim == 1 else theta[0].numel())
        wide.view(torch.int32).add_(random.view(wide.shape)).bitwise_and_(_UPPER)
        theta.copy_(wide)

    def random(self, at: int, count: int) -> Tensor:
        """16 random bits (int32) for ``count`` elements of the piece from ``at``: count, of a stack k x count."""
        index = torch.arange(count, dtype=torch.int32, device=self.keys.device)
        if self.width == self.stride:
            index.add_(noise.signed(self.start + at, 32))
        else:
            index.add_(at + self.phase)
            rows = torch.div(index, self.width, rounding_mode="floor")
            index.add_(rows.mul_(noise.signed(self.stride - self.width, 32))).add_(noise.signed(self.start, 32))
        return noise.upper(noise.bits(index, self.keys))


@dataclass
class Kahan(Rounding):
    """To the nearest, with the difference kept: weight and difference together are an fp32 number, exactly.

    Attributes:
        low: the difference in units of the fp32 number's last place (int16; like the piece: n, of a stack k x n).
    """

    low: Tensor

    def wide(self, theta: Tensor, at: int, dtype: torch.dtype) -> Tensor:
        """The fp32 numbers."""
        return joined(theta, self._part(theta, at))

    def put(self, wide: Tensor, theta: Tensor, at: int) -> None:
        """Both halves."""
        split(wide, theta, self._part(theta, at))

    def tensors(self) -> dict[str, Tensor]:
        """The difference by its name, as bytes (n x 2): no backend sends 16-bit integers."""
        return {COMPENSATION: self.low.view(torch.uint8).view(-1, 2)}

    def _part(self, theta: Tensor, at: int) -> Tensor:
        if theta.ndim == 1:
            return self.low[at : at + len(theta)]
        return self.low[:, at : at + theta[0].numel()].view(theta.shape)


def joined(theta: Tensor, low: Tensor) -> Tensor:
    """The fp32 numbers of which ``theta`` (bf16) are the nearest ones and ``low`` (int16) what they lack.

    Where a weight is 0 there is nothing that it lacks: somebody else may have set it.
    """
    wide = theta.to(torch.float32)
    wide.view(torch.int32).add_(low.masked_fill(theta == 0, 0))
    return wide


def split(wide: Tensor, theta: Tensor, low: Tensor) -> None:
    """The reverse of :func:`joined`, into ``theta`` and ``low``; ``wide`` is overwritten."""
    bits = wide.view(torch.int32)
    upper = (bits + _HALF).bitwise_and_(_UPPER)
    theta.copy_(upper.view(torch.float32))
    low.copy_(bits.sub_(upper)).masked_fill_(theta == 0, 0)


def stochastic(
    name: str, seed: int, start: int, width: int, stride: int, device: torch.device, phase: int = 0
) -> Stochastic:
    """For a piece of the parameter ``name``; see :class:`Stochastic`."""
    return Stochastic(noise.key(seed, name, device), start, width, stride, phase=phase)


def draw(states: Sequence[Any]) -> None:
    """Before a step: the keys of its random bits, for all of ``states`` (with ``rounding`` and ``taken``) at once."""
    devices: dict[torch.device, list[Any]] = {}
    for state in states:
        if isinstance(state.rounding, Stochastic):
            devices.setdefault(state.taken.device, []).append(state)
    for some in devices.values():
        of, taken = (torch.stack(each) for each in zip(*((s.rounding.key, s.taken) for s in some), strict=True))
        keys = noise.draw(of, taken, noise.WEIGHTS)
        for state, own in zip(some, keys.unbind(), strict=True):
            state.rounding.keys = own


def stacked(each: Sequence[Any]) -> Stochastic:
    """That of a stack of pieces that lie alike, from that of each."""
    keys = [one.keys for one in each]
    made: Stochastic = replace(each[0], keys=torch.stack(keys) if len(keys) > 1 else keys[0][None])
    return made
