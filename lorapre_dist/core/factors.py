"""What a rank keeps of a low-rank matrix: allocation and seeded initial values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .interval import Range, RowInterval, column_block, cut_rows


@dataclass(frozen=True)
class Peers:
    """The ranks that share one matrix.

    Attributes:
        group: their process group.
        ranges: the row-major interval of each, in order of group rank; they tile the matrix, some may be empty.
        index: this rank's place among them.
        split_columns: ``ranges`` are whole rows, of which some ranks hold some columns and others the rest.
    """

    group: Any
    ranges: tuple[Range, ...]
    index: int
    split_columns: bool = False

    def cut_rows(self, shape: tuple[int, int]) -> Sequence[int]:
        """Rows of a p x q matrix that more than one of these ranks holds a part of, in order."""
        return range(shape[0]) if self.split_columns else cut_rows(self.ranges, shape[1])


@dataclass
class Factors:
    """Factors of one moment, ``m ~ B A``, as this rank holds them.

    Attributes:
        B: rows x r, the rows that this rank's interval touches; a row cut between ranks is held by each of them.
        At: columns x r, this rank's block of the columns of ``A``, transposed so that a block is contiguous.
    """

    B: Tensor
    At: Tensor


@dataclass
class Matrix:
    """One low-rank matrix as this rank holds it.

    Attributes:
        interval: the piece of the parameter.
        peers: the ranks that share it; None if this rank holds it whole.
        m, v: factors of the first moment and of ``|g|``.
        row: energies of the touched rows (``stable``), else None.
        before: matrices and columns ahead of this one in the layout, see :class:`lorapre_dist.layouts.base.Piece`.
        step: number of updates so far.
    """

    interval: RowInterval
    peers: Peers | None
    m: Factors
    v: Factors
    row: Tensor | None
    before: tuple[int, int] = (0, 0)
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """State by name: ``m_B`` rows x r, ``m_A`` r x columns, ``v_B``, ``v_A``, and ``v_row`` in ``stable``."""
        state = {"m_B": self.m.B, "m_A": self.m.At.T, "v_B": self.v.B, "v_A": self.v.At.T}
        if self.row is not None:
            state["v_row"] = self.row
        return state

    @property
    def parts(self) -> int:
        """Number of ranks that share the matrix."""
        return len(self.peers.ranges) if self.peers else 1

    @property
    def block_size(self) -> int:
        """Columns in every rank's block of ``A``, the last ones padded."""
        return -(-self.interval.shape[1] // self.parts)


def allocate(
    interval: RowInterval,
    peers: Peers | None,
    *,
    rank: int,
    rank_v: int,
    row_energy: bool,
    init_std: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    before: tuple[int, int] = (0, 0),
) -> Matrix:
    """State of one matrix before its first step: ``B = vB = 0`` and ``A, vA ~ N(0, init_std^2)``."""
    columns = column_block(interval.shape[1], len(peers.ranges), peers.index) if peers else (0, interval.shape[1])

    def factors(moment: str, r: int) -> Factors:
        whole = initial_At(interval.name, moment, interval.shape[1], r, init_std, seed)
        block = whole[columns[0] : columns[1]].to(device=device, dtype=dtype, copy=True)
        return Factors(torch.zeros(interval.rows, r, device=device, dtype=dtype), block)

    row = torch.zeros(interval.rows, device=device, dtype=dtype) if row_energy else None
    return Matrix(interval, peers, factors("m", rank), factors("v", rank_v), row, before)


def initial_At(name: str, moment: str, q: int, r: int, std: float, seed: int) -> Tensor:
    """The initial ``A^T`` (q x r, fp32, CPU) of a parameter: a function of seed, name and shape alone."""
    digest = hashlib.blake2b(f"{seed}:{moment}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(q, r, generator=generator) * std
