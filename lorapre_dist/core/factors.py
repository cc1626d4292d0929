"""What a rank keeps of a low-rank matrix: allocation and seeded initial values."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batching import Outline
from .guard import Counted, sample
from .interval import Range, RowInterval, column_block, cut_rows
from .sizes import SAMPLES

#: The statistics are roots of mean squares; earlier versions saved the squares themselves, under these names.
SQUARES = {"rms_row": "v_row", "rms_col": "v_col"}


@dataclass(frozen=True)
class Peers:
    """The ranks that share one matrix.

    Attributes:
        group: their process group.
        ranges: the row-major interval of each, in order of group rank; they tile the matrix, some may be empty.
        index: this rank's place among them.
        columns: of whole rows (``ranges``), the columns that each of them holds; None where rows are not split so.
        turn: matrices of few ranks are stepped in two turns. Where each rank shares one with the rank before it and one
            with the next, the pairs that begin with an even rank go first: in one order all would wait in a chain.
    """

    group: Any
    ranges: tuple[Range, ...]
    index: int
    columns: tuple[Range, ...] | None = None
    turn: int = 0

    def own_columns(self, shape: tuple[int, int]) -> bool:
        """Whether every rank has all rows of a p x q matrix and just the columns that are its block of ``A``."""
        if self.columns is None:
            return False
        blocks = tuple(column_block(shape[1], len(self.ranges), k) for k in range(len(self.ranges)))
        return self.columns == blocks and set(self.ranges) == {(0, shape[0] * shape[1])}

    def largest(self, shape: tuple[int, int]) -> int:
        """Elements of the largest piece of a p x q matrix that one of these ranks holds."""
        if self.columns is None:
            return max(stop - start for start, stop in self.ranges)
        pairs = zip(self.ranges, self.columns, strict=True)
        return max((stop - start) // shape[1] * (last - first) for (start, stop), (first, last) in pairs)

    def cut_rows(self, shape: tuple[int, int]) -> Sequence[int]:
        """Rows of a p x q matrix that more than one of these ranks holds a part of, in order."""
        if self.columns is not None:
            return range(shape[0])
        if shape not in self._cut:
            self._cut[shape] = cut_rows(self.ranges, shape[1])
        return self._cut[shape]

    @functools.cached_property
    def _cut(self) -> dict[tuple[int, int], Sequence[int]]:
        """Rows by shape: a step asks for them again and again."""
        return {}


@dataclass(frozen=True)
class Ahead:
    """What a step behind training leaves for the next one. It counts as long as nobody else writes to the factors.

    Attributes:
        A: whole, r x q, padded to blocks of equal width; None where a step needs this rank's block alone.
        inverse: of the damped ``A A^T`` (r x r); None where A has orthonormal rows.
        of: with what damping, and together with which matrices, the inverse was taken.
    """

    A: Tensor | None
    inverse: Tensor | None = None
    of: Hashable = None


@dataclass
class Factors:
    """Factors of one moment, ``m ~ B A``, as this rank holds them; in ``stable`` the rows of ``A`` are orthonormal.

    Attributes:
        B: rows x r, the rows that this rank's interval touches; a row cut between ranks is held by each of them.
        A: r x columns, this rank's block of the columns of ``A``.
        ahead: what was worked out of them for the next step already; no state. None: nothing.
    """

    B: Tensor
    A: Tensor
    ahead: Ahead | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Factors:
        return Factors(copy.deepcopy(self.B, memo), copy.deepcopy(self.A, memo))

    def __reduce__(self) -> Any:
        return Factors, (self.B, self.A)


@dataclass
class Matrix(Counted):
    """One low-rank matrix as this rank holds it.

    Attributes:
        interval: the piece of the parameter.
        peers: the ranks that share it; None if this rank holds it whole.
        factors: by moment: ``m``, and in some optimizers ``v``, that of ``|g|``.
        vectors: statistics by name: ``*_row`` of the touched rows, ``*_col`` of all columns, on every rank.
        taken: number of updates so far.
        optimizer, variant: by which the state is stepped.
        before: what is ahead of this one in the layout, see :class:`lorapre_dist.layouts.base.Piece`.
        sampled: places in this rank's piece of what :func:`lorapre_dist.core.guard.sample` names; -1: not here.
    """

    interval: RowInterval
    peers: Peers | None
    factors: dict[str, Factors]
    vectors: dict[str, Tensor]
    taken: Tensor
    optimizer: str = "LoRAPre"
    variant: str = "stable"
    before: tuple[int, int, int] = (0, 0, 0)
    sampled: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """State by name: ``m_B`` rows x r, ``m_A`` r x columns, ``v_B``, ``v_A``, and the statistics."""
        state: dict[str, Tensor] = {}
        for moment, factors in self.factors.items():
            state |= {f"{moment}_B": factors.B, f"{moment}_A": factors.A}
        return state | self.vectors

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of the factors by moment."""
        return {moment: f.B.shape[-1] for moment, f in self.factors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of all state."""
        return self.factors["m"].B.dtype

    @property
    def parts(self) -> int:
        """Number of ranks that share the matrix."""
        return len(self.peers.ranges) if self.peers else 1

    @property
    def lends(self) -> bool:
        """Whether a step needs this rank's block of ``A`` alone, and gives no more of it."""
        return self.peers is None or self.peers.own_columns(self.interval.shape)

    @property
    def first_column(self) -> int:
        """The first column of the ``A`` that a step on this rank needs."""
        return column_block(self.interval.shape[1], self.parts, self.peers.index)[0] if self.peers and self.lends else 0

    @property
    def block_size(self) -> int:
        """Columns in every rank's block of ``A``, the last ones padded."""
        return -(-self.interval.shape[1] // self.parts)

    @functools.cached_property
    def starts_whole(self) -> bool:
        """Whether the first row that is touched is held whole."""
        segments = self.interval.segments()
        return bool(segments) and segments[0].col_stop - segments[0].col == self.interval.shape[1]

    @functools.cached_property
    def outline(self) -> Outline:
        """What decides how it goes through a step."""
        peers, shape = self.peers, self.interval.shape
        largest = self.interval.numel if peers is None else peers.largest(shape)
        lying = peers and (id(peers.group), peers.ranges, peers.columns)
        return Outline(
            shape=shape,
            rows=self.interval.rows,
            ranks=tuple(self.ranks.values()),
            statistics=sum(vector.numel() for vector in self.vectors.values()),
            itemsize=self.dtype.itemsize,
            parts=self.parts,
            lends=self.lends,
            largest=largest * self.dtype.itemsize,
            alike=(shape, lying, *self.ranks.items(), self.dtype, self.variant, *self.vectors),
            turn=peers.turn if peers else 0,
            before=self.before,
        )


def allocate(
    interval: RowInterval,
    peers: Peers | None,
    *,
    ranks: dict[str, int],
    vectors: tuple[str, ...],
    optimizer: str,
    variant: str,
    init_std: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    before: tuple[int, int, int] = (0, 0, 0),
) -> Matrix:
    """State of one matrix before its first step: ``B = vB = 0`` and ``A, vA ~ N(0, init_std^2)``; zero statistics.

    Args:
        ranks: of the factors by moment.
        vectors: names of the statistics, see :class:`Matrix`.
    """
    p, q = interval.rows, interval.shape[1]
    columns = column_block(q, len(peers.ranges), peers.index) if peers else (0, q)

    def factors(moment: str, r: int) -> Factors:
        whole = initial_A(interval.name, moment, r, q, init_std, seed)
        block = whole[:, columns[0] : columns[1]].to(device, dtype).contiguous()
        return Factors(torch.zeros(p, r, device=device, dtype=dtype), block)

    held = {moment: factors(moment, r) for moment, r in ranks.items()}
    sizes = {name: p if name.endswith("_row") else q for name in vectors}
    zeros = {name: torch.zeros(size, device=device, dtype=dtype) for name, size in sizes.items()}
    taken = torch.zeros((), device=device, dtype=torch.float64)
    return Matrix(
        interval, peers, held, zeros, taken, optimizer, variant, before, _sampled(replace(interval, name=""), device)
    )


@functools.lru_cache(maxsize=4096)
def _sampled(interval: RowInterval, device: torch.device) -> Tensor:
    """Places of an interval (without name), shared by all matrices that are cut alike."""
    places = [interval.place(*element) for element in sample(interval.shape)]
    held = [-1 if place is None else place for place in places]
    return torch.tensor(held + [-1] * (SAMPLES - len(held)), device=device)


def state_shapes(shape: tuple[int, int], ranks: dict[str, int], vectors: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Whole shapes of what :meth:`Matrix.tensors` holds of a p x q matrix."""
    p, q = shape
    found: dict[str, tuple[int, ...]] = {}
    for moment, r in ranks.items():
        found |= {f"{moment}_B": (p, r), f"{moment}_A": (r, q)}
    return found | {name: (p if name.endswith("_row") else q,) for name in vectors}


def initial_A(name: str, moment: str, r: int, q: int, std: float, seed: int) -> Tensor:
    """The initial ``A`` (r x q, fp32, CPU) of a parameter: a function of seed, name and shape alone."""
    digest = hashlib.blake2b(f"{seed}:{moment}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return (torch.randn(q, r, generator=generator) * std).T
