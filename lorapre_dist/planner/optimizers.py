"""What each optimizer keeps, allocates and sends on each rank: one pure function an optimizer, in one table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorapre_dist.core import batching
from lorapre_dist.core.batching import Limits, Outline, evenly_dealt
from lorapre_dist.core.sizes import SAMPLES, Sizes

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
    kind = "cpu" if request.cpu or request.offload else "cuda"
    for rank, matrices in _held(spread, int(np.argmax(state)), ranks, energies).items():
        same = slice(None) if spread.uniform else slice(rank, rank + 1)
        outlines = [matrix.outline for matrix in matrices]
        workspace[same] = batching.workspace_bytes(outlines, Sizes(), kind)
        if ours.overlap:  # as memory_report() states it
            kept = sum(batching.overlap_bytes(one, ours.variant == "paper") for one in outlines)
            workspace[same] = 2 * workspace[same] + kept
        for purpose, count in _sent(matrices, Limits.of(Sizes(), kind), ours.variant == "paper").items():
            sent[purpose][same] += count
    if request.layout in ("fsdp2", "ddp") and request.world_size > 1:  # DeepSpeed's engine looks at gradients itself
        flags = 1 + len(request.parameters)  # whether all is finite, and who has a gradient
        sent["finite"] += round(8 * flags * 2 * (request.world_size - 1) / request.world_size)
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
        outline: what decides how it goes through a step.
        cut: rows cut between the ranks that share it.
        group: who they are.
        index: this rank's place among them; all places where one rank's matrices stand for those of all.
        call: of the optimizer, in which it is stepped.
    """

    outline: Outline
    cut: int
    group: Any
    index: Any
    call: int


def _held(spread: Spread, fullest: int, ranks: tuple[int, ...], energies: int) -> dict[int, list[Held]]:
    """The matrices of each rank in the order of the step; of the fullest rank alone where all hold about the same."""
    found: dict[int, list[Held]] = {rank: [] for rank in ([fullest] if spread.uniform else range(spread.ranks))}
    for share in spread.shares:
        if not share.low_rank:
            continue
        held, (p, q) = share.held, share.parameter.shape
        who, parts = share.ranks.tolist(), len(share.held)
        group = tuple(who) if parts < spread.ranks else None
        lying = (group, held.ranges) if parts > 1 else None
        for index, rank in [(fullest, fullest)] if spread.uniform else enumerate(who):
            rows = int(held.rows[index])
            place = np.arange(parts) if spread.uniform else index
            outline = Outline(
                shape=(p, q),
                rows=rows,
                ranks=ranks,
                statistics=energies * rows,
                itemsize=FP32,
                parts=parts,
                lends=parts == 1,
                largest=FP32 * int(held.numel.max()),
                alike=((p, q), lying),
                turn=who[0] % 2 if 1 < parts < spread.ranks else 0,
                before=(0, 0, 0) if spread.own_order else (*share.ahead, 0),
            )
            found[rank].append(Held(outline, held.cut, group, place, share.call))
    return found


def _sent(matrices: list[Held], limits: Limits, paper: bool) -> dict[str, Any]:
    """Bytes that a rank sends, by the purposes of ``core/step.py``; for each bucket or wave and group one collective.

    Of a matrix over n ranks, with blocks of b = ceil(q / n) columns and c rows cut between ranks, in numbers of 4
    bytes: gather A (n-1) (b (r + r_v) + 67), reduce Z (n-1) b (r + r_v); edge rows 2 (n-1)/n c (2 + r + r_v); the Gram
    of B and that of A to their owner and back, ``2 (r^2 + r_v^2)`` each at most.
    """
    found: dict[str, Any] = defaultdict(int)

    def dealt(runs: list[list[Held]], *names: str) -> None:
        for shared in _by_group(runs):
            one, number = shared[0][0], sum(map(len, shared))
            for name, count in zip(names, _dealt(one, number), strict=True):
                found[name] = found[name] + count

    for call in sorted({m.call for m in matrices}):
        some = [m for m in matrices if m.call == call]
        for wave in batching.plan([m.outline for m in some], limits):
            buckets = [[[some[k] for k in run] for run in bucket] for bucket in wave]
            for bucket in buckets:
                for shared in _by_group(bucket):
                    for purpose, count in _exchanged([m for run in shared for m in run]).items():
                        found[purpose] += count
                if paper:
                    dealt(bucket, "reduce Gram of A", "send inverse of A")
            every = [run for bucket in buckets for run in bucket]
            dealt(every, "reduce Gram of B", "send inverse of B")
            if not paper:
                dealt(every, "reduce Gram of A", "send gauge")
    return dict(found)


def _exchanged(shared: list[Held]) -> dict[str, int]:
    """What a rank sends for the matrices of one group in a bucket, in a step's first half."""
    n, ranks = shared[0].outline.parts, shared[0].outline.ranks
    blocks = sum(m.outline.block_size * n for m in shared) * sum(ranks)
    looks = n * len(shared) * (SAMPLES + len(ranks) + 1)
    edges = sum(m.cut for m in shared) * (2 + sum(ranks))
    return {
        "gather A": round((blocks + looks) * FP32 * ((n - 1) / n)),
        "reduce Z": round(blocks * FP32 * ((n - 1) / n)),
        "edge rows": round(edges * FP32 * (2 * (n - 1) / n)),
    }


def _dealt(one: Held, number: int) -> tuple[Any, Any]:
    """What a rank sends of the Grams of so many matrices, and of the answers (``deal_out`` of ``core/exchange.py``)."""
    n, sides = one.outline.parts, Counter(one.outline.ranks)
    numbers = {r: moments * number for r, moments in sides.items()}
    if evenly_dealt(list(numbers.values()), n):
        lines = sum(-(-count // n) * n * r * r for r, count in numbers.items())
        return (round(FP32 * lines * ((n - 1) / n)),) * 2
    each = {r: -(-count // n) for r, count in numbers.items()}
    mine = FP32 * sum(np.clip(count - each[r] * one.index, 0, each[r]) * r * r for r, count in numbers.items())
    return FP32 * sum(count * r * r for r, count in numbers.items()) - mine, mine


def _by_group(runs: list[list[Held]]) -> list[list[list[Held]]]:
    """Stacks that ranks share, by who they are."""
    groups: dict[Any, list[list[Held]]] = {}
    for run in runs:
        if run[0].outline.parts > 1:
            groups.setdefault(run[0].group, []).append(run)
    return list(groups.values())
