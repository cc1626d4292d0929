"""A matrix's factors between steps, where they are kept in fewer bits, and in a step, where they are fp32.

A stack's factors are widened when its turn comes, and rounded when they have been refreshed: what exists in fp32 is a
wave of a step (``batching.py``), and the workspace counts it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import noise, quantized
from .exchange import Item, Work
from .factors import Factors, Matrix
from .guard import Go
from .workspace import Workspace


def factors(matrix: Matrix) -> dict[str, Factors]:
    """A matrix's factors as they are reckoned with, by moment: copies where they are kept in fewer bits."""
    return {
        moment: Factors(quantized.widened(f.B, -1, matrix.dtype), quantized.widened(f.A, -2, matrix.dtype))
        for moment, f in matrix.factors.items()
    }


def keep(kept: Factors, wide: Factors) -> None:
    """Put factors where they are kept, each number as the nearest one; nothing where they lie there."""
    for to, tensor, dim in ((kept.B, wide.B, -1), (kept.A, wide.A, -2)):
        if to is not tensor:
            to.copy_(quantized.rounded(tensor, quantized.form_of(to), dim))


def widen(item: Item) -> Item:
    """A stack in a step, with factors as they are reckoned with."""
    matrix = item.matrix
    if matrix.wide is None:
        return item
    return replace(item, matrix=replace(matrix, factors=factors(matrix), kept=matrix.factors))


def round_back(works: list[Work], workspace: Workspace) -> None:
    """After the refresh: the factors as they are kept, rounded stochastically."""
    for work in works:
        matrix, go = work.matrix, work.item.go
        if matrix.kept is None:
            continue
        assert matrix.salt is not None
        for k, (moment, kept) in enumerate(matrix.kept.items()):
            wide = matrix.factors[moment]
            if kept.B is wide.B:
                continue
            words = [noise.draw(matrix.salt, matrix.taken, noise.FACTORS + 2 * k + side) for side in range(2)]
            _round(kept.B, wide.B, -1, words[0], matrix.kept_rows[0], go, workspace)
            _round(kept.A, wide.A, -2, words[1], matrix.own_column, go, workspace)


def _round(kept: Tensor, wide: Tensor, dim: int, words: Tensor, first: int, go: Go, workspace: Workspace) -> None:
    """Round k factors into ``kept``, some vectors at a time; where no step is taken not a bit changes."""
    across = -3 - dim  # the dimension along which the vectors are numbered
    r, count = wide.shape[dim], wide.shape[across]
    if not count:
        return
    size = workspace.rows(count, r * len(wide), wide)
    for low in range(0, count, size):
        n = min(size, count - low)
        bits = quantized.random_bits(words, first + low, n, r, dim)
        part = kept.narrow(across, low, n)
        fresh = quantized.rounded(wide.narrow(across, low, n), quantized.form_of(kept), dim, bits)
        part.copy_(fresh if go.sure else torch.where(go.value > 0, fresh, part))
