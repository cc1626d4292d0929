"""A flat buffer cut into equal parts: DeepSpeed's ZeRO-1/2, and each of FSDP1's flat parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .ranges import holders
from .shares import Arrangement, Named, Share, turn


@dataclass(frozen=True)
class Buffer:
    """Parameters one behind the other.

    Attributes:
        offsets: of each parameter.
        part: elements of each rank's part.
    """

    offsets: tuple[int, ...]
    part: int

    @classmethod
    def of(cls, numels: Sequence[int], ranks: int, align: int = 1, pad: int = 1) -> Buffer:
        """Each begins at a multiple of ``align`` elements; a part is a multiple of ``pad``."""
        offsets, end = [], 0
        for numel in numels:
            offsets.append(-(-end // align) * align)
            end = offsets[-1] + numel
        return cls(tuple(offsets), -(-end // (pad * ranks)) * pad)


def zero12(named: Named, ranks: int, align: int = 1, round_robin: bool = False) -> Arrangement:
    """One buffer, padded to 2 N elements (``stage_1_and_2.py``).

    Args:
        align: elements to a multiple of which parameters begin.
        round_robin: parameter k is put in the order of ``k mod N``.
    """
    ordered = list(named)
    if round_robin:
        ordered = [one for _, one in sorted(enumerate(ordered), key=lambda pair: pair[0] % ranks)]
    buffer = Buffer.of([math.prod(shape) for _, shape in ordered], ranks, align, pad=2)
    shares = tuple(_share(*one, at, buffer.part, ranks) for one, at in zip(ordered, buffer.offsets, strict=True))
    return Arrangement(ranks, shares, (buffer.part,) * ranks, buffer.part, lists_all=False)


def fsdp1(units: Sequence[Named], order: Named, ranks: int, align: int = 4) -> Arrangement:
    """A buffer for each wrapped module (``_flat_param.py``); with ``use_orig_params``, at addresses of 16 bytes.

    Args:
        units: parameters of each wrapped module.
        order: all of them, in the order in which they are stepped.
        align: elements in 16 bytes.
    """
    found, partition = dict[str, Share](), 0
    for unit in units:
        buffer = Buffer.of([math.prod(shape) for _, shape in unit], ranks, align)
        partition += buffer.part
        for (name, shape), at in zip(unit, buffer.offsets, strict=True):
            found[name] = _share(name, shape, at, buffer.part, ranks)
    return Arrangement(ranks, tuple(found[name] for name, _ in order), (partition,) * ranks)


def _share(name: str, shape: tuple[int, ...], at: int, part: int, ranks: int) -> Share:
    held = holders(at, at + math.prod(shape), part)
    order = turn(min(held, default=0), len(held), ranks)
    return Share(name, shape, tuple(held), tuple(held.values()), turn=order)
