"""What each optimizer keeps, allocates and sends on each rank: one pure function an optimizer, in one table."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorapre_dist.core import sizes
from lorapre_dist.core.sizes import ACCELERATOR, BLOCK, BUCKET, CHUNK, SAMPLES

from .request import Request
from .spread import Array, Spread

FP32 = 4


@dataclass
class Costs:
    """Bytes on each rank (arrays over :attr:`Spread.ranks`).

    Attributes:
        state: of optimizer state, without the weights' fp32 masters.
        workspace: that a step allocates for itself, at most.
        sent: by purpose, in a step and a ring implementation, as ``core/comm.py`` counts.
    """

    state: Array
    workspace: Array
    sent: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """An entry of the comparison.

    Attributes:
        costs: its bytes, from the request and where the parameters lie.
        formula: the bytes of state of a p x q matrix, for the reader.
        whole: it knows no layout: every rank keeps and steps all of its weights, in their own precision.
        deals_out: under DDP it shares its state out among the ranks.
    """

    costs: Callable[[Request, Spread], Costs]
    formula: str
    whole: bool = False
    deals_out: bool = False


def adamw(_: Request, spread: Spread) -> Costs:
    """AdamW, fused: ``exp_avg`` and ``exp_avg_sq`` in fp32, 8 bytes an element; elementwise, so it sends nothing."""
    state = sum((spread.total(s, 2 * FP32 * s.held.numel) for s in spread.shares), _zeros(spread))
    return Costs(state, _zeros(spread))


def muon(_: Request, spread: Spread) -> Costs:
    """``torch.optim.Muon`` on the matrices that LoRAPre takes, AdamW on the rest.

    A momentum in fp32: 4 p q bytes. Newton-Schulz needs whole matrices, so each of the n ranks that share one gathers
    it: (n-1)/n 4 p q. A step on a matrix holds the gathered fp32 update (4 p q), its bf16 form and a product of the
    same size (2 p q each), and two bf16 products of m x m, m = min(p, q).
    """
    state, gathered, workspace = _zeros(spread), _zeros(spread), _zeros(spread)
    for share in spread.shares:
        state += spread.total(share, (FP32 if share.low_rank else 2 * FP32) * share.held.numel)
        if share.low_rank:
            numel, parts = share.parameter.numel, len(share.held)
            gathered += spread.total(share, round(FP32 * numel * (parts - 1) / parts))
            need = 8 * numel + 4 * min(share.parameter.shape) ** 2
            workspace = np.maximum(workspace, spread.total(share, need))
    return Costs(state, workspace, {"gather updates": gathered} if gathered.any() else {})


def galore(request: Request, spread: Spread) -> Costs:
    """GaLore as ``galore-torch`` 1.0 does it (``GaLoreAdamW``, ``proj_type="std"``), which knows no sharded layout.

    All state in the weights' own precision, e bytes. A p x q matrix: a projector on its smaller side, min(p, q) r, and
    two moments of the projected gradient, 2 max(p, q) r; elsewhere Adam's 2 numbers an element. A step on a matrix
    holds the SVD in fp32 of the gradient (4 p q, and 4 m (p + q) for its vectors, m = min(p, q)), or the update
    projected back (e p q), which is less.
    """
    rank, width = request.optimizer.rank, request.width
    elements = largest = 0
    for share in spread.shares:
        if share.low_rank:
            small, large = sorted(share.parameter.shape)
            elements += rank * (small + 2 * large)
            largest = max(largest, FP32 * (small * large + small * (small + large)))
        else:
            elements += 2 * share.parameter.numel
    return Costs(_zeros(spread) + width * elements, _zeros(spread) + largest)


def lorapre(request: Request, spread: Spread) -> Costs:
    """LoRAPre: fp32 factors of both moments, ``(r + r_v)`` numbers for each row and column held, and row energies.

    Rows are those that the rank's interval touches, columns a block of all columns of ``A`` (core/factors.py); AdamW
    elsewhere. It sends the factors of matrices that ranks share, see :func:`_sent`.
    """
    ours = request.optimizer
    ranks, energies = tuple(ours.ranks.values()), len(ours.vectors)
    state = _zeros(spread)
    for share in spread.shares:
        if share.low_rank:
            numbers = (sum(ranks) + energies) * share.held.rows + sum(ranks) * share.held.columns
        else:
            numbers = 2 * share.held.numel
        state += spread.total(share, FP32 * numbers)
    workspace = _zeros(spread)
    sent: dict[str, Array] = defaultdict(lambda: _zeros(spread))
    for rank, matrices in _held(spread, int(np.argmax(state)), ranks).items():
        same = slice(None) if spread.uniform else slice(rank, rank + 1)
        workspace[same] = _workspace(matrices, ranks, energies, request.cpu or request.offload)
        for purpose, count in _sent(matrices, ranks, ours.variant == "paper").items():
            sent[purpose][same] += count
    if request.layout in ("fsdp2", "ddp") and request.world_size > 1:  # DeepSpeed's engine looks at gradients itself
        sent["finite"] += round(8 * 2 * (request.world_size - 1) / request.world_size)
    if request.layout == "ddp" and request.world_size > 1:
        stepped = sum((spread.total(s, s.held.numel) for s in spread.shares), _zeros(spread))
        sent["broadcast parameters"] = FP32 * stepped
    return Costs(state, workspace, dict(sent))


#: The comparison, in the order of the table.
OPTIMIZERS: dict[str, Optimizer] = {
    "LoRAPre": Optimizer(lorapre, "4 ((r + r_v)(p + q) + p)", deals_out=True),
    "AdamW": Optimizer(adamw, "8 p q"),
    "Muon": Optimizer(muon, "4 p q"),
    "GaLore": Optimizer(galore, "e r (min(p, q) + 2 max(p, q)), e bytes a weight", whole=True),
}


def _zeros(spread: Spread) -> Array:
    return np.zeros(spread.ranks, np.int64)


@dataclass(frozen=True)
class Held:
    """A matrix on one rank.

    Attributes:
        rows: touched.
        q: columns of the whole matrix.
        parts: ranks that share it.
        cut: rows cut between them.
        group: who they are.
        call: of the optimizer, in which it is stepped.
        bucket: in which its factors are exchanged.
    """

    rows: int
    q: int
    parts: int
    cut: int
    group: Any
    call: int
    bucket: int

    @property
    def padded(self) -> int:
        """Columns of ``A`` in the blocks of all ranks, the last ones padded."""
        return -(-self.q // self.parts) * self.parts


def _held(spread: Spread, fullest: int, ranks: tuple[int, ...]) -> dict[int, list[Held]]:
    """The matrices of each rank in the order of the step; of the fullest rank alone where all send the same.

    Buckets are cut by what is ahead of a matrix, as ``core/regression.py`` does.
    """
    found: dict[int, list[Held]] = {rank: [] for rank in ([fullest] if spread.uniform else range(spread.ranks))}
    start: dict[int, tuple[int, int]] = {}
    for share in spread.shares:
        if not (share.low_rank or spread.own_order):
            continue
        parts, held = len(share.held), share.held
        group, cut = tuple(share.ranks.tolist()) if parts < spread.ranks else None, held.cut if share.low_rank else 0
        pairs = zip(share.ranks.tolist(), held.rows.tolist(), strict=True)
        for rank, rows in [(fullest, int(held.rows[fullest]))] if spread.uniform else pairs:
            count, columns = start.setdefault(rank, share.first) if spread.own_order else (0, 0)
            if share.low_rank:
                ahead = _bytes(ranks, 5 * (share.ahead[1] - columns), 4 * (share.ahead[0] - count))
                found[rank].append(Held(rows, held.q, parts, cut, group, share.call, ahead // BUCKET))
    return found


def _runs(matrices: list[Held]) -> list[list[Held]]:
    """Consecutive matrices of one bucket."""
    return [list(run) for _, run in itertools.groupby(matrices, key=lambda matrix: matrix.bucket)]


def _bytes(ranks: tuple[int, ...], columns: int, squares: int) -> int:
    return FP32 * (columns * sum(ranks) + squares * sum(r * r for r in ranks))


def _transient(matrix: Held, ranks: tuple[int, ...]) -> int:
    return _bytes(ranks, (1 if matrix.parts == 1 else 5) * matrix.padded, 4)


def _sent(matrices: list[Held], ranks: tuple[int, ...], paper: bool) -> dict[str, int]:
    """Bytes that a rank sends, by the purposes of ``core/exchange.py``; for each bucket and group one collective.

    Of a matrix over n ranks, with blocks of b = ceil(q / n) columns and c rows cut between ranks, in numbers of 4
    bytes: gather A (n-1) (b (r + r_v) + 67), reduce Z (n-1) b (r + r_v); edge rows 2 (n-1)/n c (2 + r + r_v); Grams
    of A and of B 2 (n-1)/n (r^2 + r_v^2) each, in ``paper`` that of A with the edge rows.
    """
    found: dict[str, int] = defaultdict(int)
    grams = sum(r * r for r in ranks)
    for call in sorted({m.call for m in matrices}):
        for run in _runs([m for m in matrices if m.call == call]):
            groups: dict[Any, list[Held]] = {}
            for matrix in run:
                if matrix.parts > 1:
                    groups.setdefault(matrix.group, []).append(matrix)
            for shared in groups.values():
                n = shared[0].parts
                blocks = sum(m.padded for m in shared) * sum(ranks)
                edges = sum(m.cut for m in shared) * (2 + sum(ranks))
                looks = n * len(shared) * (SAMPLES + len(ranks) + 1)
                summed = {"edge rows": edges, "Gram of A": len(shared) * grams, "Gram of B": len(shared) * grams}
                if paper:
                    summed["edge rows and Gram of A"] = summed.pop("edge rows") + summed.pop("Gram of A")
                found["gather A"] += round((blocks + looks) * FP32 * ((n - 1) / n))
                found["reduce Z"] += round(blocks * FP32 * ((n - 1) / n))
                for purpose, numbers in summed.items():
                    if numbers:
                        found[purpose] += round(numbers * FP32 * (2 * (n - 1) / n))
    return dict(found)


def _workspace(matrices: list[Held], ranks: tuple[int, ...], energies: int, cpu: bool) -> int:
    """The bound that ``memory_report`` states, from numbers alone (``workspace_bytes`` of ``core/regression.py``)."""
    if not matrices:
        return 0
    limit = BLOCK * (1 if cpu else ACCELERATOR)
    kinds = [(m.rows, m.q) if m.parts == 1 else None for m in matrices]
    places = sizes.runs(kinds, [FP32 * m.rows * m.q for m in matrices], limit)
    stacked = {k for run in places for k in run}
    runs: list[tuple[list[Held], int, Any]]
    runs = [(run, 0, max) for run in _runs([m for k, m in enumerate(matrices) if k not in stacked])]
    for run in ([matrices[k] for k in run] for run in places):
        numbers = sum(2 * m.rows * m.q + (m.rows + m.q) * sum(ranks) + energies * m.rows for m in run)
        runs.append((run, FP32 * numbers, sum))
    square = sum(r * r for r in ranks)
    batch = square * max(len(run) for run, _, _ in runs)
    if cpu:
        batch = min(batch, max(CHUNK, square))
    block = max(most(min(max(limit, m.q * FP32), m.rows * m.q * FP32) for m in run) for run, _, most in runs)
    blocks = 4 * block + max(2 * block, 5 * BLOCK)
    rows = max(most(min(m.rows, max(1, limit // (m.q * FP32))) for m in run) for run, _, most in runs)
    held = max(sum(_transient(m, ranks) for m in run) + copied for run, copied, _ in runs)
    r = max(ranks)
    gauged = [
        most(r * (m.padded // m.parts + min(m.rows, max(1, limit // (r * FP32)))) for m in run) for run, _, most in runs
    ]
    return held + 4 * batch * 8 + blocks + (4 * rows * sum(ranks) + max(gauged)) * FP32
