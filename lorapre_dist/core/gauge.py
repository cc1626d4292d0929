"""The gauge of the factors: of all ``(B R, R^-1 A)``, which have one product, that where A's rows are orthonormal.

Only ``B A`` means something. Left to themselves A grows and B shrinks by a factor ``1 + gamma`` a step under noise: the
new B is correlated with the noise that has just gone into it, so that ``B^+ g`` comes to ``2 A``, until fp32 overflows.
In the gauge ``A^+`` is ``A^T``, and A's condition is 1. Each rank holds a block of A's columns and some rows of B: the
Gram of A is summed on one rank, and the r x r factor that this works out is sent to all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import at_rest, dealing, exchange, quantized
from .comm import Comm
from .exchange import Work
from .factors import Factors, Matrix
from .linalg import gram, mm
from .refresh import gauges, unpacked
from .sizes import ROWS, stripes
from .workspace import Workspace

NAMES = "reduce Gram of A", "send gauge"


def grams_of_A(works: list[Work]) -> list[list[Tensor]]:
    """This rank's part of ``A A^T`` of each work and moment."""
    return [[gram(moment.factors.A, wide=True) for moment in work.moments] for work in works]


def regauge(works: list[Work], damping: float, comm: Comm, workspace: Workspace) -> None:
    """``(B, A) <- (B L, L^-1 A)`` with ``L L^T = A A^T + d``: the same product, and rows of A that are orthonormal."""
    go = works[0].item.go

    def received(packed: Tensor) -> Tensor:
        both = unpacked(packed)
        if go.sure:
            return both
        eye = torch.eye(both.shape[-1], dtype=both.dtype, device=both.device)
        return torch.where(go.value > 0, both, eye)  # without a step not a bit may change

    def solved(grams: Tensor) -> Tensor:
        return gauges(grams, damping)

    found = dealing.deal_out(works, grams_of_A(works), solved, received, comm, NAMES, workspace.bucket)
    for work, both in zip(works, found, strict=True):
        for moment, one in zip(work.moments, both, strict=True):
            change(moment.factors, _replicas(work.matrix), one[:, 0], one[:, 1], workspace)


def _replicas(matrix: Matrix) -> list[int]:
    """Rows of B that other ranks hold as well, though not among the same rows: cut ones at the ends of an interval."""
    if matrix.peers is None:
        return []
    first, rows = matrix.interval.first_row, matrix.interval.rows
    return [row - first for row in matrix.peers.replicated_rows(matrix.interval.shape) if 0 <= row - first < rows]


def change(factors: Factors, replicas: list[int], lower: Tensor, inverse: Tensor, workspace: Workspace) -> None:
    """``A <- L^-1 A`` and ``B <- B L``; of a large matrix's triangles in stripes, without most of the zeros.

    A product rounds a row as its place among the others has it. ``replicas`` are multiplied by themselves, so that all
    ranks that hold one have the same bits, and a resumed run, which loads one of them, does not differ.
    """
    A, B = factors.A, factors.B
    r = lower.shape[-1]
    alike = [(row, B[:, row, None] @ lower) for row in replicas]
    found = workspace.take("gauged A", A.shape, A)
    parts = stripes(r, ROWS) if A.shape[0] == 1 else ((0, r),)
    for low, high in parts:
        mm(inverse[:, low:high, :high], A[:, :high], out=found[:, low:high])
    A.copy_(found)
    rows = workspace.rows(max(1, B.shape[1]), r, B) if B.shape[0] == 1 else max(1, B.shape[1])
    for part in B.split(rows, dim=1):
        for low, high in parts:  # each reads columns that only later ones change
            part[..., low:high].copy_(mm(part[..., low:], lower[:, low:, low:high]))
    for row, product in alike:
        B[:, row, None] = product


def settle(matrices: list[Matrix], damping: float, comm: Comm, fresh: bool) -> None:
    """Bring factors of any size, as drawn or as saved by others, into the gauge; in fp64. A collective over peers.

    Args:
        fresh: all, with the damping of a step; else those whose A is not as orthonormal rows are, without.
    """
    holders = [_Holder(matrix) for matrix in matrices]
    grams = [[gram(f.A.double(), wide=True) for f in at_rest.factors(matrix).values()] for matrix in matrices]
    exchange.sum_grams(holders, grams, comm)
    for matrix, of_matrix in zip(matrices, grams, strict=True):
        wide = at_rest.factors(matrix)
        for (moment, kept), G in zip(matrix.factors.items(), of_matrix, strict=True):
            r, factors = G.shape[0], wide[moment]
            most = 1.01 if quantized.form_of(kept.A) == "fp32" else 1.25  # rounding is no drift
            if fresh or float(G.square().sum()) > most * r or float(G.trace()) < r / 2:
                lower, inverse = unpacked(gauges(G[None], damping if fresh else 0.0))[0]
                factors.A.copy_(inverse @ factors.A.double())
                alike = [(row, factors.B[row].double() @ lower) for row in _replicas(matrix)]
                factors.B.copy_(factors.B.double() @ lower)
                for row, product in alike:
                    factors.B[row] = product
                at_rest.keep(kept, factors)


@dataclass(frozen=True)
class Condition:
    """How one moment's factors stand: Frobenius norms, and condition numbers of ``A A^T`` and ``B^T B``."""

    norm_A: float
    norm_B: float
    cond_A: float
    cond_B: float


def conditions(matrices: list[Matrix], comm: Comm) -> list[dict[str, Condition]]:
    """Of each matrix, by moment; in fp64. A collective over peers."""
    holders = [_Holder(matrix) for matrix in matrices]
    grams = []
    for matrix in matrices:
        owned = slice(matrix.first_counted, None)
        wide = [(f.A.double(), f.B[owned].double()) for f in at_rest.factors(matrix).values()]
        grams.append([G for A, B in wide for G in (gram(A, wide=True), gram(B, wide=False))])
    exchange.sum_grams(holders, grams, comm)

    def of(G: Tensor) -> tuple[float, float]:
        values = torch.linalg.eigvalsh(G)
        least = values[0].clamp_min(torch.finfo(G.dtype).tiny)
        return float(G.trace().sqrt()), float(values[-1] / least)

    found = []
    for matrix, some in zip(matrices, grams, strict=True):
        stated = [of(G) for G in some]
        pairs = zip(matrix.factors, stated[::2], stated[1::2], strict=True)
        found.append({moment: Condition(a[0], b[0], a[1], b[1]) for moment, a, b in pairs})
    return found


@dataclass
class _Holder:
    matrix: Matrix
