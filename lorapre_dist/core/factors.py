"""What a rank keeps of a low-rank matrix: allocation and seeded initial values."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import forms, noise, quantized, spec
from .batching import Outline, outline
from .guard import Counted, sample
from .interval import Peers, Range, RowInterval, column_block
from .rounding import Rounding
from .sizes import SAMPLES
from .spec import Axis
from .transfer import Transfer, on_one

#: The statistics are roots of mean squares; earlier versions saved the squares themselves, under these names.
SQUARES = {"rms_row": "v_row", "rms_col": "v_col"}


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
        B: rows x r, the rows that this rank's interval touches; a row cut between ranks is held by each of them. Of
            rows whose columns are split a block of them, but in a step, which gathers all that are touched.
        A: r x columns, this rank's block of the columns of ``A``.
        ahead: what was worked out of them for the next step already; no state. None: nothing.

    Between steps both may be kept in fewer bits, see ``forms.py``: in 8 they are rows x (r + 4) and (r + 4) x columns.
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
        vectors: statistics by name: ``*_row`` of the rows of ``B``, ``*_col`` of all columns, on every rank.
        codes: AdamW's moments in 8 bits by name (``codes.py``), one for each element of the piece; mostly none.
        taken: number of updates so far.
        optimizer, variant: by which the state is stepped.
        before: what is ahead of this one in the layout, see :class:`lorapre_dist.layouts.base.Piece`.
        sampled: places in this rank's piece of what :func:`lorapre_dist.core.guard.sample` names; -1: not here.
        wide: the type that a step reckons in, where factors are kept in fewer bits; else None.
        salt: key of the random bits that round them, or ``codes`` (0-d, int64); None where nothing is rounded.
        kept: in a step, the factors as they are kept, where ``factors`` are wider copies.
        rest: in a step, what this rank keeps of the rows, where all that it touches have been gathered, by name.
        rounding: how the weights are kept.
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
    wide: torch.dtype | None = None
    salt: Tensor | None = None
    kept: dict[str, Factors] | None = None
    rest: dict[str, Tensor] | None = None
    rounding: Rounding = field(default_factory=Rounding)
    codes: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """State by name: the low-rank state, and what there is for each element."""
        return self.low_rank_tensors() | self.elementwise()

    def elementwise(self) -> dict[str, Tensor]:
        """State with a number, or two bytes, for each element: codes, and that of ``rounding``."""
        return self.codes | self.rounding.tensors()

    def low_rank_tensors(self) -> dict[str, Tensor]:
        """``m_B`` rows x r, ``m_A`` r x columns, ``v_B``, ``v_A``, and the statistics."""
        state: dict[str, Tensor] = {}
        for moment, factors in self.factors.items():
            if self.ranks[moment]:
                state |= {f"{moment}_B": factors.B, f"{moment}_A": factors.A}
        return state | self.vectors

    @functools.cached_property
    def low_rank(self) -> bool:
        """Whether there are factors of a rank beyond 0."""
        return any(self.ranks.values())

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of the factors by moment."""
        return {moment: quantized.rank_of(f.B, -1) for moment, f in self.factors.items()}

    @property
    def forms(self) -> dict[str, str]:
        """In which form the factors are kept, by moment, see ``forms.py``."""
        return {moment: quantized.form_of(f.B) for moment, f in self.factors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type that a step reckons in."""
        return self.wide or self.factors["m"].B.dtype

    @property
    def parts(self) -> int:
        """Number of ranks that share the matrix."""
        return len(self.peers.ranges) if self.peers else 1

    @functools.cached_property
    def lends(self) -> bool:
        """Whether a step needs this rank's block of ``A`` alone, and gives no more of it."""
        return self.peers is None or self.peers.own_columns(self.interval.shape)

    def transfer(self, owner: int) -> Transfer:
        """How the pieces that ranks hold become the whole matrix on the one at place ``owner``."""
        if owner not in self._transfers:
            assert self.peers is not None
            shape = self.interval.shape
            self._transfers[owner] = Transfer(self.peers, shape, on_one(owner, self.parts, shape))
        return self._transfers[owner]

    @functools.cached_property
    def _transfers(self) -> dict[int, Transfer]:
        return {}

    @property
    def first_column(self) -> int:
        """The first column of the ``A`` that a step on this rank needs."""
        return column_block(self.interval.shape[1], self.parts, self.peers.index)[0] if self.peers and self.lends else 0

    @property
    def own_column(self) -> int:
        """The first column of this rank's block of ``A``."""
        return min(self.interval.shape[1], self.peers.index * self.block_size) if self.peers else 0

    @property
    def deals_rows(self) -> bool:
        """Whether this rank keeps but some of the rows that it touches."""
        return self.peers is not None and self.peers.deals_rows(self.interval.shape)

    @property
    def kept_rows(self) -> Range:
        """The rows of ``B``, of the whole matrix, that this rank keeps."""
        if self.peers is not None and self.deals_rows:
            return self.peers.row_blocks(self.interval.shape)[self.peers.index]
        return self.interval.first_row, self.interval.first_row + self.interval.rows

    @property
    def parts_of_rows(self) -> tuple[Range, ...]:
        """The rows that each of the ranks that share it keeps."""
        assert self.peers is not None
        return self.peers.row_blocks(self.interval.shape)

    def rows(self) -> dict[str, Tensor]:
        """The state that lies with rows, by name."""
        factors = {f"{moment}_B": f.B for moment, f in self.factors.items()}
        return factors | {key: v for key, v in self.vectors.items() if spec.axis_of(key) is Axis.ROWS}

    def take_rows(self, key: str, tensor: Tensor) -> None:
        """Let ``tensor`` be one of those."""
        if key in self.vectors:
            self.vectors[key] = tensor
        else:
            self.factors[key.removesuffix("_B")].B = tensor

    @property
    def first_counted(self) -> int:
        """Index, among the rows that this rank keeps, of the first one that no other rank counts."""
        return 0 if self.deals_rows else self.interval.first_owned

    @property
    def block_size(self) -> int:
        """Columns in every rank's block of ``A``, the last ones padded."""
        return -(-self.interval.shape[1] // self.parts)

    @functools.cached_property
    def starts_whole(self) -> bool:
        """Whether the first row that is touched is held whole."""
        segments = self.interval.segments
        return bool(segments) and segments[0].col_stop - segments[0].col == self.interval.shape[1]

    @functools.cached_property
    def outline(self) -> Outline:
        """What decides how it goes through a step."""
        statistics = sum(vector.numel() for vector in self.vectors.values())
        kind = (*self.factors, *self.forms.values(), self.dtype, self.variant, *self.vectors)
        ranks, widened = tuple(self.ranks.values()), forms.smaller(self.ranks, self.forms)
        of = self.interval, self.peers, ranks, statistics, self.dtype.itemsize, self.before
        of_rows = sum(spec.axis_of(name) is Axis.ROWS for name in self.vectors)
        return outline(*of, *kind, widened=widened, row_statistics=of_rows)


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
    kept: Mapping[str, str] | None = None,
    rounding: Rounding | None = None,
) -> Matrix:
    """State of one matrix before its first step: ``B = vB = 0`` and ``A, vA ~ N(0, init_std^2)``; zero statistics.

    Args:
        ranks: of the factors by moment.
        vectors: names of the statistics, see :class:`Matrix`.
        kept: form in which the factors are kept, by moment (``forms.py``); default: all of them in fp32.
    """
    kept, q = kept or {}, interval.shape[1]
    columns = column_block(q, len(peers.ranges), peers.index) if peers else (0, q)
    low, high = (0, interval.rows) if peers is None else peers.row_blocks(interval.shape)[peers.index]
    lengths = {Axis.ROWS: high - low, Axis.COLUMNS: columns[1] - columns[0], Axis.ALL_COLUMNS: q}
    lengths[Axis.ELEMENTS] = interval.numel

    def zeros(key: str) -> Tensor:
        one = specs[key]
        return torch.zeros(one.shape(lengths[one.axis]), device=device, dtype=getattr(torch, one.dtype))

    specs = spec.of_matrix(ranks, vectors, str(dtype).removeprefix("torch."), kept)

    def factors(moment: str, r: int) -> Factors:
        whole = initial_A(interval.name, moment, r, q, init_std, seed)
        block = whole[:, columns[0] : columns[1]].to(device, dtype).contiguous()
        form = kept.get(moment, "fp32")
        B = zeros(f"{moment}_B") if r else torch.zeros(high - low, 0, device=device, dtype=dtype)
        return Factors(B, quantized.rounded(block, form, -2))

    held = {moment: factors(moment, r) for moment, r in ranks.items()}
    statistics = {name: zeros(name) for name in vectors}
    taken = torch.zeros((), device=device, dtype=torch.float64)
    sampled = sampled_places(replace(interval, name=""), device)
    made = Matrix(interval, peers, held, statistics, taken, optimizer, variant, before, sampled)
    made.rounding = rounding or made.rounding
    made.codes = {key: zeros(key) for key, one in specs.items() if one.axis is Axis.ELEMENTS}
    if forms.smaller(ranks, kept):
        made.wide = dtype
    if made.wide is not None or made.codes:
        made.salt = noise.key(seed, interval.name, device)
    return made


@functools.lru_cache(maxsize=4096)
def sampled_places(interval: RowInterval, device: torch.device) -> Tensor:
    """Places of an interval (without name), shared by all matrices that are cut alike."""
    places = [interval.place(*element) for element in sample(interval.shape)]
    held = [-1 if place is None else place for place in places]
    return torch.tensor(held + [-1] * (SAMPLES - len(held)), device=device)


def state_shapes(
    shape: tuple[int, int], ranks: dict[str, int], vectors: Iterable[str], kept: Mapping[str, str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Whole shapes of what :meth:`Matrix.tensors` holds of a p x q matrix; ``kept`` as in :func:`allocate`."""
    lengths = {Axis.ROWS: shape[0], Axis.COLUMNS: shape[1], Axis.ALL_COLUMNS: shape[1]}
    specs = spec.of_matrix(ranks, vectors, kept=kept).items()
    return {key: shape if one.axis is Axis.ELEMENTS else one.shape(lengths[one.axis]) for key, one in specs}


def initial_A(name: str, moment: str, r: int, q: int, std: float, seed: int) -> Tensor:
    """The initial ``A`` (r x q, fp32, CPU) of a parameter: a function of seed, name and shape alone."""
    digest = hashlib.blake2b(f"{seed}:{moment}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return (torch.randn(q, r, generator=generator) * std).T
