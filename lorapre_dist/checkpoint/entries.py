"""What ``checkpoint.json`` says of each tensor: untrained, under AdamW, or with factors.

    {"kind": "untrained", "shape": [...]}
    {"kind": "adamw", "shape": [...], "step": n}
    {"kind": "lorapre", "optimizer": "LoRAPre", "variant": "stable", "vectors": ["rms_row"], "rank": r, "rank_v": s,
     "forms": {"m": "8bit", "v": "8bit"}, "shape": [p, q], "step": n}

``forms`` says how factors are kept that are not in fp32 (``core/forms.py``); without it all are. With
``"weights": "kahan"`` the bits are saved that a parameter's 16-bit weights lack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config.options import STATE_DTYPES
from ..core.factors import SQUARES
from ..core.spec import SCALES
from . import files

#: What says the rank of each moment's factors; an optimizer without a low-rank second moment has no ``rank_v``.
RANKS = {"m": "rank", "v": "rank_v"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor that is not trained; the others are more.

    Attributes:
        shape: whole.
    """

    kind: ClassVar[str] = "untrained"
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {"kind": self.kind, "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class Trained(Entry):
    """A parameter whose elements have AdamW's state.

    Attributes:
        step: number of updates so far.
        compensated: whether the bits are there that its 16-bit weights lack.
    """

    kind: ClassVar[str] = "adamw"
    step: int
    compensated: bool = False

    @property
    def coded(self) -> bool:
        """Whether AdamW's moments are in 8 bits (``core/codes.py``)."""
        return False

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return super().to_json() | {"step": self.step} | ({"weights": "kahan"} if self.compensated else {})


@dataclass(frozen=True, kw_only=True)
class LowRank(Trained):
    """A matrix with factors.

    Attributes:
        optimizer, variant: by which it was stepped.
        ranks: of the factors, by moment.
        vectors: names of the statistics.
        forms: in which the factors are kept, by moment; fp32 where it is not said.
    """

    kind: ClassVar[str] = "lorapre"
    optimizer: str
    variant: str
    ranks: dict[str, int]
    vectors: tuple[str, ...]
    forms: dict[str, str] = field(default_factory=dict)

    @property
    def coded(self) -> bool:
        """Whether AdamW's moments are in 8 bits: it has no factors, but scales for its rows."""
        return any(vector in SCALES for vector in self.vectors)

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        identity = {"optimizer": self.optimizer, "variant": self.variant, "vectors": list(self.vectors)}
        ranks = {RANKS[moment]: rank for moment, rank in self.ranks.items()}
        forms = {"forms": self.forms} if self.forms else {}
        return {"kind": self.kind, **identity, **ranks, **forms, **super().to_json()}


def read(entry: Any) -> Entry:
    """An entry of the file.

    Raises:
        ValueError: it is of no form that is known, in words.
    """
    if not isinstance(entry, dict) or entry.get("kind") not in [one.kind for one in (Entry, Trained, LowRank)]:
        raise ValueError(f"no kind that is known: {entry!r:.80}")
    shape = entry.get("shape")
    if not (isinstance(shape, list) and all(files.is_count(n) for n in shape) and math.prod(shape) < 1 << 63):
        raise ValueError(f"a shape that is none: {shape!r:.80}")
    if entry["kind"] == Entry.kind:
        return Entry(shape=tuple(shape))
    if not files.is_count(entry.get("step")):
        raise ValueError(f"a step that is no whole number: {entry.get('step')!r:.80}")
    if entry.get("weights", "kahan") != "kahan":
        raise ValueError(f"weights that are kept in no way that is known: {entry['weights']!r:.80}")
    trained = {"shape": tuple(shape), "step": entry["step"], "compensated": "weights" in entry}
    return Trained(**trained) if entry["kind"] == Trained.kind else LowRank(**trained, **_of_factors(entry))


def _of_factors(entry: dict[str, Any]) -> dict[str, Any]:
    if len(entry["shape"]) != 2:
        raise ValueError(f"factors of a tensor that is no matrix: {entry['shape']!r:.80}")
    optimizer, variant = entry.get("optimizer", "LoRAPre"), entry.get("variant")  # the first versions had but one
    ranks = {moment: entry.get(key) for moment, key in RANKS.items() if moment == "m" or key in entry}
    for moment, rank in ranks.items():
        if not (files.is_count(rank) and (rank or optimizer in ("LoRAPreAdafactor", "AdamW8bit"))):
            raise ValueError(f"a {RANKS[moment]} that is no rank: {rank!r:.80}")
    if not isinstance(variant, str) or not isinstance(optimizer, str):
        raise ValueError("an optimizer or variant that is no text")
    vectors = entry.get("vectors", ["v_row"] if variant == "stable" else [])  # nor did they say these
    if not isinstance(vectors, list) or any(v not in (*SQUARES, *SQUARES.values(), *SCALES) for v in vectors):
        raise ValueError(f"statistics that are not known: {vectors!r:.80}")
    forms = entry.get("forms", {})
    if not isinstance(forms, dict) or any(m not in RANKS or form not in STATE_DTYPES for m, form in forms.items()):
        raise ValueError(f"factors in a form that is not known: {forms!r:.80}")
    return {"optimizer": optimizer, "variant": variant, "ranks": ranks, "vectors": tuple(vectors), "forms": forms}
