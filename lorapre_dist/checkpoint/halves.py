"""Weights in two halves, bf16 and the 16 bits that it lacks (``compensation``), loaded in one, and the other way round.

Both halves together are an fp32 number. So fp32 weights (masters) that were saved become both halves without loss, and
both halves become fp32 weights; where bf16 alone is kept, what the upper half says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.rounding import COMPENSATION, joined, split
from ..state.shards import MODEL, OPTIMIZER, Shard, bring_home
from . import dcp
from .entries import Trained

#: Elements of weights that are brought from one form to the other at a time.
BATCH = 32 << 20


@dataclass(frozen=True)
class Change:
    """Names of parameters whose lower halves are kept on one side alone, the same on every rank.

    Attributes:
        here: kept here and not saved, of the shapes that the weights have.
        there: the other way round.
    """

    here: dict[str, tuple[int, ...]]
    there: dict[str, tuple[int, ...]]

    @classmethod
    def between(cls, saved: Mapping[str, Trained], present: Mapping[str, Trained]) -> Change:
        """From what was saved of trained parameters to what is kept of them now; names that only one side has apart."""
        common = {n: (saved[n].compensated, e.compensated) for n, e in present.items() if n in saved}
        return cls(
            {n: present[n].shape for n, halves in common.items() if halves == (False, True)},
            {n: present[n].shape for n, halves in common.items() if halves == (True, False)},
        )

    def say(self) -> None:
        """Warn of what is not as it was."""
        if self.here:
            text = "the bits that their bf16 weights lack are those of the weights that were saved"
            warnings.warn(
                f"{len(self.here)} parameters have a compensation here that was not saved: {text}", stacklevel=3
            )
        if self.there:
            text = "fp32 weights take it in, bf16 weights are as rounded (weights='kahan' would keep it)"
            warnings.warn(f"the compensation of {len(self.there)} parameters is not kept here: {text}", stacklevel=3)


def load(folder: Path, change: Change, weights: dict[str, Shard], lower: dict[str, Shard], group: Any = None) -> None:
    """Bring weights from the form in which they were saved to that in which they are kept; a collective.

    Args:
        weights: the shards of the weights, loaded already, by name in the checkpoint.
        lower: those of the compensation.
    """
    for names in _batches(change.here):
        _take_apart(folder, {n: weights[MODEL + n] for n in names if MODEL + n in weights}, lower, group)
    for names in _batches(change.there):
        mine = {n: weights[MODEL + n] for n in names if MODEL + n in weights}
        _put_together(folder, {n: shard for n, shard in mine.items() if shard.local.dtype.itemsize > 2}, group)


def _take_apart(folder: Path, mine: dict[str, Shard], lower: dict[str, Shard], group: Any) -> None:
    """Both halves of the weights that were saved, into those of ``mine`` (by name of the parameter) and ``lower``."""
    wide = {MODEL + n: Shard(s.shape, s.start, torch.empty_like(s.local, dtype=torch.float32)) for n, s in mine.items()}
    dcp.load(folder, wide, group)
    for name, shard in mine.items():
        low = torch.empty_like(shard.local, dtype=torch.int16)
        split(wide[MODEL + name].local, shard.local, low)
        part = lower.get(_lower(name))
        if part is not None:  # under DDP a part of the weights, which every rank has
            begin = part.start - shard.start
            part.local.copy_(low.view(torch.uint8).view(-1, 2)[begin : begin + len(part.local)])
    bring_home(mine)
    bring_home({key: lower[key] for key in map(_lower, mine) if key in lower})


def _put_together(folder: Path, mine: dict[str, Shard], group: Any) -> None:
    """Add the lower halves that were saved to fp32 weights, of which the upper ones are there."""
    bits = {}
    for name, shard in mine.items():
        pairs = torch.empty((*shard.local.shape, 2), dtype=torch.uint8, device=shard.local.device)
        bits[_lower(name)] = Shard((*shard.shape, 2), shard.start, pairs)
    dcp.load(folder, bits, group)
    for name, shard in mine.items():
        low = bits[_lower(name)].local.view(torch.int16).view(-1)
        shard.local.copy_(joined(shard.local.to(torch.bfloat16), low))
    bring_home(mine)


def _lower(name: str) -> str:
    return f"{OPTIMIZER}{name}.{COMPENSATION}"


def _batches(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in sorted(shapes.items()):
        numel = torch.Size(shape).numel()
        if names and size + numel > BATCH:
            yield names
            names, size = [], 0
        names.append(name)
        size += numel
    if names:
        yield names
