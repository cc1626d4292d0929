"""What a step looks at before it changes anything: whether gradients are finite, and how large they are.

A step with a gradient that is not finite changes nothing, on all ranks alike: all that it would change is multiplied
by ``go``, which is 0 then, on the device, so that no host waits for one. (Where a host knows, on a CPU, it leaves out
what would do nothing.)

Squares of numbers beyond 1e19, or below 1e-19, are no fp32 numbers. So what is squared is divided by a power of two of
its matrix's size first, which rounds nothing. And an element that is 1e11 times as large as the others are, a flipped
bit say, counts as 0, or it would be all that a matrix knows for a thousand steps. What size the others are is the
second largest of ``SAMPLES`` elements, at places that depend on the matrix's shape alone: all layouts see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sizes import SAMPLES

#: Elements larger than so many times the sample's second largest count as 0.
OUTLIER = 2.0**36
#: Sizes within which nothing has to be divided: squares of what is so many times as large, summed up, are fp32 numbers.
CALM = (2.0**-30, 2.0**10)
#: Larger elements of a gradient under AdamW are taken for this: their squares would be infinite.
ADAMW_LARGEST = 2.0**62


@dataclass
class Go:
    """Whether a step is taken.

    Attributes:
        value: 1 or 0, 0-d, fp64, on the device of what is stepped.
        sure: the host knows that it is 1 and that every gradient is finite.
    """

    value: Tensor
    sure: bool = False
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def of(self, factor: Any, dtype: torch.dtype) -> Any:
        """``factor`` (a number, or 0-d) if the step is taken, else 0: a number where the host knows it."""
        return factor if self.sure else self._between(factor, 0.0, dtype)

    def keep(self, factor: Any, dtype: torch.dtype) -> Any:
        """``factor`` (a number, or 0-d) if the step is taken, else 1: what state is decayed by."""
        return factor if self.sure else self._between(factor, 1.0, dtype)

    def pair(self, first: Any, second: Any, like: Tensor) -> Tensor:
        """Two numbers (or 0-d) beside each other where ``like`` is; made once in a step of the same two."""
        key = first, second, like.dtype  # tensors by identity, which what is kept with them holds on to
        if key not in self._made:
            found = like.new_empty(2)
            found[0].fill_(first)
            found[1].fill_(second)
            self._made[key] = found
        return self._made[key]

    def _between(self, taken: Any, skipped: float, dtype: torch.dtype) -> Tensor:
        """One number or the other; made once in a step, for all matrices."""
        if isinstance(taken, Tensor):
            return (self.value * (taken - skipped) + skipped).to(dtype)
        key = taken, skipped, dtype
        if key not in self._made:
            self._made[key] = (self.value * (taken - skipped) + skipped).to(dtype)
        return self._made[key]


class Counted:
    """State with a count of updates: ``taken`` (0-d, fp64) lies on the device, where it is known whether one is."""

    taken: Tensor

    @property
    def step(self) -> int:
        """Number of updates so far."""
        return int(self.taken)

    @step.setter
    def step(self, value: int) -> None:
        self.taken.fill_(value)


def broadcast(x: Any, dims: int) -> Any:
    """A number as it is; of a tensor (0-d, of a stack k) one with ``dims`` more dimensions."""
    return x[(..., *[None] * dims)] if isinstance(x, Tensor) else x


def taken_for_granted(device: torch.device) -> Go:
    """For gradients that somebody else has looked at."""
    return Go(torch.ones((), dtype=torch.float64, device=device), sure=True)


def bounds(tensors: list[Tensor]) -> list[Tensor]:
    """A bound on the elements of each tensor (0-d), which is finite if and only if they are."""
    full = [x for x in tensors if x.numel()]
    if not full:
        return [x.new_zeros(()) for x in tensors]
    if full[0].device.type != "cpu":
        found = list(torch._foreach_norm(full, float("inf")))
    else:  # another norm takes a tenth of the time; where its squares leave the range it says nothing
        found = list(torch._foreach_norm(full, 2))
        norms = torch.stack([norm.double() for norm in found])
        for k in ((norms > 1e-15) & (norms < 1e15)).logical_not().nonzero().view(-1).tolist():
            found[k] = full[k].abs().amax()
    each = iter(found)
    return [next(each) if x.numel() else x.new_zeros(()) for x in tensors]


def sample(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Row and column of the elements of a p x q matrix that are looked at: in all rows' and columns' parts alike."""
    p, q = shape
    return sorted({(k * p // SAMPLES, (k * 40503 % 65536) * q // 65536) for k in range(SAMPLES)})


@dataclass(frozen=True)
class Size:
    """How large the gradients and momenta of a stack's matrices are (k x 1 x 1).

    Attributes:
        inverse: what is squared is multiplied by this power of two first; None: by 1, as the host knows.
        largest: elements of the gradient that are larger, or no numbers, count as 0; None: there are none, as the host
            knows. It is 0 where no step is taken.
    """

    inverse: Tensor | None
    largest: Tensor | None

    @classmethod
    def of_all(cls, some: Sequence[Size]) -> Size:
        """Those of a stack, of the same step, from each matrix's."""

        def together(each: Sequence[Tensor | None]) -> Tensor | None:
            known = [x for x in each if x is not None]
            return None if not known else known[0] if len(known) == 1 else torch.cat(known)

        return cls(together([size.inverse for size in some]), together([size.largest for size in some]))

    def of(self, k: int) -> Size:
        """That of one matrix, as of a stack of one."""
        return Size(*(None if x is None else x[k : k + 1] for x in (self.inverse, self.largest)))

    def cleaned(self, g: Tensor) -> Tensor:
        """A gradient without elements that count as 0; itself if there are none."""
        return g if self.largest is None else torch.where(g.abs() <= self.largest, g, 0.0)

    def scaled(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` by ``inverse``; x itself where that is 1."""
        return x if self.inverse is None else torch.mul(x, self._like(x), out=out)

    def undone(self, x: Tensor) -> Tensor:
        """``x``, which was made of scaled numbers, in its own size."""
        return x if self.inverse is None else x / self._like(x)

    def _like(self, x: Tensor) -> Tensor:
        """``inverse`` to broadcast with x, whose first dimension is that of the stack."""
        assert self.inverse is not None
        return self.inverse.view(-1, *[1] * (x.ndim - 1))


def sizes(looks: list[Tensor], go: Go) -> list[Size]:
    """The size of each stack of k matrices.

    Args:
        looks: of each k lines: ``SAMPLES`` absolute values of the gradient, bounds on the factors ``B``, and one on all
            of the gradient.
    """
    every = torch.cat(looks) if len(looks) > 1 else looks[0]
    sampled, state, largest = every[:, :SAMPLES], every[:, SAMPLES:-1], every[:, -1]
    typical = sampled.topk(2).values[:, 1]
    some = typical > 0
    level = torch.maximum(torch.where(some, typical, largest), state.amax(-1))
    allowed = torch.where(some, typical * OUTLIER, torch.finfo(typical.dtype).max)
    if go.sure and every.device.type == "cpu":
        outside = (level > 0) & ((level < CALM[0]) | (level > CALM[1]))
        if not (outside | (largest > allowed)).any():
            return [Size(None, None)] * len(looks)
    # Of what is no number 1, so that nothing else becomes none.
    inverse = level.log2_().floor_().nan_to_num_(0.0).clamp_(-120, 120).neg_().exp2_()
    numbers = [len(look) for look in looks]
    most = (allowed * go.of(1.0, allowed.dtype)).view(-1, 1, 1).split(numbers)
    return [Size(*pair) for pair in zip(inverse.view(-1, 1, 1).split(numbers), most, strict=True)]


@dataclass
class Skips:
    """How many steps were skipped, all together and in a row at the end; counted on the device.

    ``seen`` is what the host knows of them without waiting: on a CPU all, on accelerators perhaps not the last ones.
    """

    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    in_row: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    seen: tuple[int, int] = (0, 0)
    _copy: Any = None

    def __getstate__(self) -> dict[str, Any]:  # an event of the device cannot be copied
        return {**self.__dict__, "_copy": None}

    def record(self, go: Tensor) -> None:
        """Count a step that was taken (1) or not (0)."""
        skipped = 1 - go
        self.total = self.total.to(go.device) + skipped
        self.in_row = (self.in_row.to(go.device) + 1) * skipped

    def restart(self, total: int) -> None:
        """Go on from a run in which so many were skipped."""
        self.total = torch.full_like(self.total, total)
        self.in_row = torch.zeros_like(self.in_row)
        self.seen, self._copy = (total, 0), None

    def look(self) -> tuple[int, int]:
        """What the host knows by now: total, and in a row."""
        if self.total.device.type == "meta":  # where there are no numbers
            return self.seen
        if self.total.device.type != "cuda":
            self.seen = int(self.total), int(self.in_row)
            return self.seen
        if torch.cuda.is_current_stream_capturing():  # a CUDA graph: nobody can look while it is made, or replayed
            return self.seen
        if self._copy is not None and self._copy[1].query():
            self.seen = int(self._copy[0][0]), int(self._copy[0][1])
            self._copy = None
        if self._copy is None:
            event = torch.cuda.Event()
            copied = torch.stack([self.total, self.in_row]).to("cpu", non_blocking=True)
            event.record()
            self._copy = (copied, event)
        return self.seen
