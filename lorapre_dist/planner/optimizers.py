"""What each optimizer keeps, allocates and sends on each rank: one pure function an optimizer, in one table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorapre_dist.core.refresh import CHUNK
from lorapre_dist.core.workspace import Workspace

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
    r, rv = request.optimizer.rank, request.optimizer.resolved_rank_v
    energies = request.optimizer.variant == "stable"
    state = _zeros(spread)
    for share in spread.shares:
        if share.low_rank:
            numbers = (r + rv + energies) * share.held.rows + (r + rv) * share.held.columns
        else:
            numbers = 2 * share.held.numel
        state += spread.total(share, FP32 * numbers)
    workspace = _zeros(spread)
    sent: dict[str, Array] = defaultdict(lambda: _zeros(spread))
    held = _held(spread, int(np.argmax(state)))
    for rank, matrices in held.items():
        ranks = slice(None) if spread.uniform else slice(rank, rank + 1)
        workspace[ranks] = _workspace(matrices, r, rv, request.cpu or request.offload)
        for purpose, count in _sent(matrices, r, rv).items():
            sent[purpose][ranks] += count
    if request.layout == "ddp" and request.world_size > 1:
        sent["broadcast parameters"] = sum(
            (spread.total(s, FP32 * s.held.numel) for s in spread.shares), _zeros(spread)
        )
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
    """A matrix on one rank: rows touched, columns, ranks that share it, rows cut between them, and who they are."""

    rows: int
    q: int
    parts: int
    cut: int
    group: Any
    call: int

    @property
    def block(self) -> int:
        """Columns of ``A`` in every rank's block, the last ones padded."""
        return -(-self.q // self.parts)


def _held(spread: Spread, fullest: int) -> dict[int, list[Held]]:
    """The matrices of each rank in the order of the step; of the fullest rank alone where all send the same."""
    found: dict[int, list[Held]] = {rank: [] for rank in ([fullest] if spread.uniform else range(spread.ranks))}
    for share in spread.shares:
        if not share.low_rank:
            continue
        parts = len(share.held)
        group = int(share.ranks[0]), parts
        if spread.uniform:
            pairs = [(fullest, int(share.held.rows[fullest]))]
        else:
            pairs = list(zip(share.ranks.tolist(), share.held.rows.tolist(), strict=True))
        for rank, rows in pairs:
            found[rank].append(Held(rows, share.held.q, parts, share.held.cut, group, share.call))
    return found


def _runs(matrices: list[Held], r: int, rv: int) -> list[list[Held]]:
    """Consecutive matrices whose transient factors fit in a bucket, as ``core/adam.py`` cuts them."""
    runs: list[list[Held]] = []
    used = 0
    for matrix in matrices:
        size = _transient(matrix, r, rv)
        if not runs or used + size > Workspace.bucket:
            runs.append([])
            used = 0
        runs[-1].append(matrix)
        used += size
    return runs


def _transient(matrix: Held, r: int, rv: int) -> int:
    factors = (1 if matrix.parts == 1 else 5) * matrix.block * matrix.parts * (r + rv)
    return FP32 * (factors + 4 * (r * r + rv * rv))


def _sent(matrices: list[Held], r: int, rv: int) -> dict[str, int]:
    """Bytes that a rank sends, by the purposes of ``core/exchange.py``; for each bucket and group one collective.

    Of a matrix over n ranks, with blocks of b = ceil(q / n) columns and c rows cut between ranks, in numbers of 4
    bytes: gather A and reduce Z (n-1)/n n b (r + r_v) each; edge rows and Gram of A 2 (n-1)/n (c (2 + r + r_v) + r^2 +
    r_v^2); Gram of B 2 (n-1)/n (r^2 + r_v^2).
    """
    found: dict[str, int] = defaultdict(int)
    grams = r * r + rv * rv
    for call in sorted({m.call for m in matrices}):
        for run in _runs([m for m in matrices if m.call == call], r, rv):
            groups: dict[Any, list[Held]] = {}
            for matrix in run:
                if matrix.parts > 1:
                    groups.setdefault(matrix.group, []).append(matrix)
            for shared in groups.values():
                n = shared[0].parts
                blocks = n * sum(m.block for m in shared) * (r + rv)
                edges = sum(m.cut * (2 + r + rv) + grams for m in shared)
                found["gather A"] += round(blocks * FP32 * ((n - 1) / n))
                found["edge rows and Gram of A"] += round(edges * FP32 * (2 * (n - 1) / n))
                found["reduce Z"] += round(blocks * FP32 * ((n - 1) / n))
                found["Gram of B"] += round(len(shared) * grams * FP32 * (2 * (n - 1) / n))
    return dict(found)


def _workspace(matrices: list[Held], r: int, rv: int, cpu: bool) -> int:
    """The bound that ``memory_report`` states, from numbers alone (``report.py``)."""
    if not matrices:
        return 0
    runs = _runs(matrices, r, rv)
    square = r * r + rv * rv
    batch = square * max(map(len, runs))
    if cpu:
        batch = min(batch, max(CHUNK, square))
    block = max(max(Workspace.block, m.q * FP32) for m in matrices)
    rows = max(min(m.rows, max(1, Workspace.block // (m.q * FP32))) for m in matrices)
    solved = max(m.q if m.rows >= m.q else 0 for m in matrices)
    bucket = max(sum(_transient(m, r, rv) for m in run) for run in runs)
    return bucket + 4 * batch * 8 + 5 * block + (3 * rows + solved) * (r + rv) * FP32
