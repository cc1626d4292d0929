"""AdamW's moments saved in fp32 and kept in 8 bits (``core/codes.py``), and the other way round.

From fp32 each number becomes the nearest one that can be kept. Every rank reads the whole rows that it has a part of,
so that all find the same scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core import codes
from ..core.spec import CODES, SCALES
from ..state.shards import OPTIMIZER, Shard, bring_home
from . import dcp
from .entries import Trained

#: What the scales are those of, where it is in fp32.
MOMENTS = {scale: scale.removesuffix("_row") for scale in SCALES}


@dataclass(frozen=True)
class Change:
    """Names of parameters whose moments are in codes on one side alone, with their shapes; the same on every rank.

    Attributes:
        coded: in codes here, and saved in fp32.
        plain: the other way round.
    """

    coded: dict[str, tuple[int, ...]]
    plain: dict[str, tuple[int, ...]]

    @classmethod
    def between(cls, saved: Mapping[str, Trained], present: Mapping[str, Trained]) -> Change:
        """From what was saved of trained parameters to what is kept of them now."""
        pairs = {name: (saved[name].coded, now.coded) for name, now in sorted(present.items()) if name in saved}
        return cls(
            {name: present[name].shape for name, both in pairs.items() if both == (False, True)},
            {name: present[name].shape for name, both in pairs.items() if both == (True, False)},
        )

    def names(self) -> set[str]:
        """What a load of tensors as they were saved leaves out, by name in a checkpoint."""
        keys = [*SCALES, *CODES, *MOMENTS.values()]
        return {_key(name, key) for name in (*self.coded, *self.plain) for key in keys}

    def say(self) -> None:
        """Warn that something is converted."""
        for names, form in ((self.coded, "8 bits (other_state='adamw8bit')"), (self.plain, "fp32")):
            if names:
                text = f"AdamW's moments of {len(names)} parameters were saved in another form, and are converted to"
                warnings.warn(f"{text} {form}", stacklevel=3)


def load(folder: Path, change: Change, shards: dict[str, Shard], group: Any = None) -> None:
    """Fill the moments whose form changes; a collective.

    Args:
        shards: of the optimizer's state, by name in the checkpoint.
    """
    for name, shape in change.coded.items():
        _encode(folder, name, shape, shards, group)
    for name, shape in change.plain.items():
        _decode(folder, name, shape, shards, group)


def _encode(folder: Path, name: str, shape: tuple[int, ...], shards: dict[str, Shard], group: Any) -> None:
    (p, q), filled = shape, {}
    for scale, key in SCALES.items():
        saved = _key(name, MOMENTS[scale])
        for part, each in ((key, q), (scale, 1)):  # of the codes' rows and of the scales' own, which may be others
            mine, loaded = shards.get(_key(name, part)), dict[str, Shard]()
            if mine is not None:
                first, last = mine.start // each, -(-(mine.start + len(mine.local)) // each)
                wide = torch.empty((last - first) * q, device=mine.local.device)
                loaded[saved] = Shard((p * q,), first * q, wide)
            dcp.load(folder, loaded, group)
            if mine is None:
                continue
            filled[_key(name, part)] = mine
            rows = wide.view(-1, q)
            largest = rows.abs().amax(1) if len(rows) else wide
            if part == scale:
                mine.local.copy_(largest)
            else:
                found, begin = codes.encoded(rows, largest[:, None], mine.local.dtype), mine.start - first * q
                mine.local.copy_(found.view(-1)[begin : begin + len(mine.local)])
    bring_home(filled)


def _decode(folder: Path, name: str, shape: tuple[int, ...], shards: dict[str, Shard], group: Any) -> None:
    (p, q), filled = shape, {}
    for scale, key in SCALES.items():
        mine, loaded = shards.get(_key(name, MOMENTS[scale])), dict[str, Shard]()
        if mine is not None:
            like, first = mine.local, mine.start // q
            rows = like.new_empty(-(-(mine.start + len(like)) // q) - first)
            code = torch.empty_like(like, dtype=getattr(torch, CODES[key]))
            loaded = {
                _key(name, key): Shard(mine.shape, mine.start, code),
                _key(name, scale): Shard((p,), first, rows),
            }
        dcp.load(folder, loaded, group)
        if mine is not None:
            begin = mine.start - first * q
            mine.local.copy_(codes.decoded(code, rows.repeat_interleave(q)[begin : begin + len(code)]))
            filled[_key(name, MOMENTS[scale])] = mine
    bring_home(filled)


def _key(name: str, part: str) -> str:
    return f"{OPTIMIZER}{name}.{part}"
