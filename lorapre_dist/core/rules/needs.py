"""What each rule asks of a step beside what all of them do: numbers alone, for the step as for its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..sizes import Sizes
from .muon import cuts


@dataclass(frozen=True)
class Needs:
    """What a rule asks of a step.

    Attributes:
        boundary_sums: numbers that are summed, or compared, for each row that is cut between ranks, beside ``Y``.
        column_sums: whether sums over the columns of each matrix go with them.
        iterations: of Newton-Schulz on each Gram of the update; none if that is not made orthogonal.
        sizes: how much goes together.
        passes: numbers read or written in memory for each element of a matrix.
        block_calls, stack_calls, wave_calls: operations started for each row block, stack and wave.
    """

    boundary_sums: int = 0
    column_sums: bool = False
    iterations: tuple[int, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    passes: int = 17
    block_calls: int = 14
    stack_calls: int = 22
    wave_calls: int = 92

    @property
    def per_element(self) -> int:
        """Numbers per element of a matrix that are kept from the first block to the end of the bucket."""
        return cuts.PER_ELEMENT if self.iterations else 0


ADAM = Needs(2, passes=43, block_calls=48, stack_calls=43, wave_calls=142)
ADAFACTOR = Needs(1, column_sums=True, passes=39, block_calls=47, stack_calls=39, wave_calls=95)
ADAMW8BIT = Needs(2, passes=60, block_calls=60, stack_calls=30, wave_calls=60)
MOMENTUM = Needs()
LION = Needs(passes=19)
#: Buckets of Muon are so large that all ranks have matrices to iterate on.
MUON_SIZES = Sizes(bucket=256 << 20, accelerator_bucket=256 << 20)


def of_muon(ns_steps: int) -> Needs:
    """Momentum whose update is made orthogonal in so many iterations."""
    return Needs(iterations=tuple(cuts.segments(ns_steps)), sizes=MUON_SIZES)


_OF: dict[str, Callable[[Any], Needs]] = {
    "LoRAPre": lambda config: ADAM,
    "LoRAPreAdafactor": lambda config: ADAFACTOR,
    "AdamW8bit": lambda config: ADAMW8BIT,
    "LoRAPreMuon": lambda config: of_muon(config.ns_steps),
    "LoRAPreSGD": lambda config: MOMENTUM,
    "LoRAPreLion": lambda config: LION,
}


def of(config: Any) -> Needs:
    """Of an optimizer by its settings (:class:`lorapre_dist.config.LowRankConfig`)."""
    return _OF[config.optimizer](config)
