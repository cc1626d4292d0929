"""In which form factors are kept between steps: sizes alone, for a plan as for a run.

    fp32    as they are reckoned with (fp64 where the parameter is)
    bf16    two bytes a number
    8bit    one byte a number, and a scale (fp32) for each vector

A vector is what a row of ``B``, or a column of ``A``, has: r numbers. No layout cuts one, so neither form knows where
ranks begin and end. In 8 bits the scale's bytes lie behind the vector's: ``B`` is p x (r + 4), ``A`` (r + 4) x q.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Bytes of a vector's scale.
SCALE = 4
#: Their types by torch's names, where they have one of their own.
DTYPES = {"bf16": "bfloat16", "8bit": "int8"}


def length(r: int, form: str) -> int:
    """Numbers that a vector of r is kept as."""
    return r + SCALE if form == "8bit" else r


def smaller(ranks: Mapping[str, int], forms: Mapping[str, str]) -> int:
    """Sum of the ranks of factors that a step has to widen."""
    return sum(r for moment, r in ranks.items() if forms.get(moment, "fp32") != "fp32")
