"""What tensors the state of a parameter consists of: by name the axis along which each lies, its width, its type.

One statement for what allocates, saves and reshards state, and for a plan, which has no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from . import forms


class Axis(Enum):
    """How a tensor of state lies on the ranks that share a parameter."""

    #: With the rows that a rank touches; one that is cut between ranks is held by each of them.
    ROWS = "rows"
    #: Dealt out in equal blocks of columns.
    COLUMNS = "columns"
    #: Of all columns, on every rank.
    ALL_COLUMNS = "all columns"
    #: With the elements.
    ELEMENTS = "elements"


#: AdamW's moments in 8 bits (``codes.py``), and their types; by those of the rows' scales, which are statistics.
CODES = {"exp_avg_8bit": "int8", "exp_avg_sq_8bit": "uint8"}
SCALES = {"exp_avg_row": "exp_avg_8bit", "exp_avg_sq_row": "exp_avg_sq_8bit"}
#: Bytes of a number.
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a parameter's state.

    Attributes:
        axis: along which it lies.
        rank: its other side, as of factors; None: it is 1-D.
        dtype: torch's name of its type.
    """

    axis: Axis
    rank: int | None = None
    dtype: str = "float32"

    @property
    def dim(self) -> int:
        """The dimension along which it lies: of ``A``, which is r x q, the second."""
        return 1 if self.axis is Axis.COLUMNS else 0

    def shape(self, length: int) -> tuple[int, ...]:
        """Its shape where it is so long along its axis."""
        if self.rank is None:
            return (length,)
        return (self.rank, length) if self.dim else (length, self.rank)

    def bytes(self, length: int) -> int:
        """Bytes where it is so long along its axis."""
        return length * (1 if self.rank is None else self.rank) * BYTES[self.dtype]


#: Tensors of a parameter's state by name.
StateSpec = Mapping[str, TensorSpec]


@functools.cache
def axis_of(key: str) -> Axis:
    """The axis of a tensor by its name: ``m_B``, ``v_A``, ``rms_row``, ``rms_col``; others lie with the elements."""
    ends = {"B": Axis.ROWS, "row": Axis.ROWS, "A": Axis.COLUMNS, "col": Axis.ALL_COLUMNS}
    return ends.get(key.rpartition("_")[2], Axis.ELEMENTS)


def of_matrix(
    ranks: Mapping[str, int], vectors: Iterable[str], dtype: str = "float32", kept: Mapping[str, str] | None = None
) -> dict[str, TensorSpec]:
    """The state of a matrix.

    Args:
        ranks: of the factors by moment.
        vectors: names of the statistics, see :class:`lorapre_dist.core.factors.Matrix`; :data:`SCALES` have codes.
        dtype: of the statistics, and of the factors where ``kept`` names no other form.
        kept: form in which the factors are kept, by moment, see :mod:`lorapre_dist.core.forms`.
    """
    found = {}
    for moment, r in ranks.items():
        form = (kept or {}).get(moment, "fp32")
        for key in (f"{moment}_B", f"{moment}_A") if r else ():
            found[key] = TensorSpec(axis_of(key), forms.length(r, form), forms.DTYPES.get(form, dtype))
    vectors = tuple(vectors)
    found |= {key: TensorSpec(axis_of(key), None, dtype) for key in vectors}
    codes = [SCALES[key] for key in vectors if key in SCALES]
    return found | {key: TensorSpec(Axis.ELEMENTS, None, CODES[key]) for key in codes}


def of_vector(dtype: str = "float32") -> dict[str, TensorSpec]:
    """The state of a parameter under AdamW."""
    return {key: TensorSpec(axis_of(key), None, dtype) for key in ("exp_avg", "exp_avg_sq")}


def of_rounding(weights: str | None) -> dict[str, TensorSpec]:
    """What is kept beside weights of 16 bits (``rounding.py``): with ``"kahan"`` the 16 that they lack, as bytes."""
    return {"compensation": TensorSpec(Axis.ELEMENTS, 2, "uint8")} if weights == "kahan" else {}
