"""What our optimizers keep, allocate, send and compute on each rank, as ``core/`` states it of itself."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable

import numpy as np

from lorapre_dist.core import arithmetic, batching, forms, spec, traffic
from lorapre_dist.core.arithmetic import Work
from lorapre_dist.core.batching import Limits
from lorapre_dist.core.interval import Peers, Range, RowInterval, column_block
from lorapre_dist.core.rules import needs as rules
from lorapre_dist.core.rules.muon import cuts as muon_cuts
from lorapre_dist.core.rules.needs import Needs
from lorapre_dist.core.spec import Axis
from lorapre_dist.core.traffic import Held
from lorapre_dist.layouts.geometry.shares import Arrangement, Share

from .request import Request
from .rivals import FP32, Array, Costs, is_matrix, numel, over_ranks, zeros


def costs(request: Request, arrangement: Arrangement) -> Costs:
    """Of the request's optimizer."""
    needs, kind = rules.of(request.optimizer), "cpu" if request.cpu or request.offload else "cuda"
    state = state_bytes(request, arrangement)
    found = Costs(state, zeros(arrangement), Work())
    limits = Limits.of(needs.sizes, kind, needs.per_element * FP32)
    sent: dict[str, Array] = defaultdict(lambda: zeros(arrangement))
    stable = request.optimizer.variant == "stable"
    fullest = int(np.argmax(state))
    vectors = sum((over_ranks(arrangement, s, numel(s)) for s in arrangement.shares if not is_matrix(request, s)), 0)
    ranks = looked_at(arrangement, fullest)
    mine = held(request, arrangement, ranks)
    for rank, after in zip(ranks, [*ranks[1:], arrangement.size], strict=True):
        matrices, same = mine[rank], slice(None) if arrangement.uniform else slice(rank, after)
        found.workspace[same] = workspace_bytes(matrices, needs, kind)
        if request.optimizer.overlap:  # as memory_report() states it
            kept = sum(batching.overlap_bytes(m.outline, not stable) for m in matrices)
            found.workspace[same] = 2 * found.workspace[same] + kept
        calls = 0
        for one in traffic.collectives(matrices, needs, limits, stable, kind):
            calls += one.calls
            if not arrangement.uniform:
                sent[one.purpose][same] += one.at(one.peers.index)
                continue
            sent[one.purpose] += one.bytes
            for index, more in one.more.items():
                sent[one.purpose][index] += more
            if one.each:
                sent[one.purpose] += np.asarray(one.each, np.int64)
        work = arithmetic.of_step(matrices, needs, limits, stable, kind)
        work.add(Work(moved=7.0 * FP32 * int(vectors[rank] if np.ndim(vectors) else vectors), calls=10))
        if work.products + work.moved > found.work.products + found.work.moved:
            found.work = work
        found.calls = max(found.calls, calls)
    found.sent = dict(sent) | _agreed(request, arrangement)
    return found


def _agreed(request: Request, arrangement: Arrangement) -> dict[str, Array]:
    """What is sent beside the steps of matrices: whether to step, and under DDP the results."""
    found, n = {}, arrangement.size
    if not request.layout.startswith("zero") and n > 1:  # DeepSpeed's engine looks at gradients itself
        found["finite"] = zeros(arrangement) + traffic.agreeing(len(request.parameters), n)
    if arrangement.steps:
        found["broadcast parameters"] = FP32 * np.asarray(arrangement.steps, np.int64)
    return found


def state_bytes(request: Request, arrangement: Arrangement) -> Array:
    """Bytes of state on each rank, by the tensors that it consists of."""
    vector, total = spec.of_vector(), zeros(arrangement)
    for share in arrangement.shares:
        kept = request.kept_as(share.name, share.shape) if len(share.shape) == 2 else None
        if kept is not None:
            lengths = _lengths((share.shape[0], share.shape[1]), share.ranges, share.columns)
            matrix = spec.of_matrix(kept.ranks, kept.vectors, kept=kept.forms)
            size = sum(one.bytes(1) * lengths[one.axis] for one in matrix.values())
        else:
            size = sum(one.bytes(1) * numel(share) for one in vector.values())
        total += over_ranks(arrangement, share, size)
    return total


@functools.lru_cache(maxsize=1024)  # matrices of a few shapes lie alike, and there may be thousands of ranks
def _lengths(shape: tuple[int, int], ranges: tuple[Range, ...], columns: tuple[Range, ...] | None) -> dict[Axis, Array]:
    """How long a matrix's state is on each rank, by axis."""
    parts, q = len(ranges), shape[1]
    blocks = [column_block(q, parts, k) for k in range(parts)]
    touched = [
        RowInterval("", shape, *held, None if columns is None else columns[k]).rows for k, held in enumerate(ranges)
    ]
    return {
        Axis.ROWS: np.array(touched, np.int64),
        Axis.COLUMNS: np.array([last - first for first, last in blocks], np.int64),
        Axis.ALL_COLUMNS: np.full(parts, q, np.int64),
    }


def workspace_bytes(matrices: list[Held], needs: Needs, kind: str) -> int:
    """Bound on what a step on a rank's matrices allocates for itself."""
    more, limit = None, needs.sizes.block_on(kind)
    if needs.iterations:
        more = [muon_cuts.transient_bytes(m.interval.shape, m.peers, FP32, needs.iterations, limit) for m in matrices]
    outlines = [m.outline for m in matrices]
    return batching.workspace_bytes(outlines, needs.sizes, kind, needs.per_element * FP32, more) if matrices else 0


#: So many parts of matrices are looked at on all ranks together, at most.
MOST = 5_000


def looked_at(arrangement: Arrangement, fullest: int) -> list[int]:
    """The ranks whose matrices are looked at, each of which stands for those up to the next one, too.

    All of them, as far as :data:`MOST` allows; the fullest one alone where all take part in everything.
    """
    if arrangement.uniform:
        return [fullest]
    every = -(-sum(len(share.ranks) for share in arrangement.shares if len(share.shape) == 2) // MOST)
    return sorted({*range(0, arrangement.size, max(1, every)), fullest})


def held(request: Request, arrangement: Arrangement, ranks: list[int]) -> dict[int, list[Held]]:
    """The matrices of each of some ranks in the order of the step."""
    found: dict[int, list[Held]] = {rank: [] for rank in ranks}
    groups: dict[Hashable, object] = {}
    for share in arrangement.shares:
        if is_matrix(request, share):
            whole = len(share.ranks) == arrangement.size  # place and rank are the same
            places = zip(ranks, ranks, strict=True) if whole else enumerate(share.ranks)
            for index, rank in places:
                if rank in found:
                    found[rank].append(_held(request, share, index, groups))
    return found


def _held(request: Request, share: Share, index: int, groups: dict[Hashable, object]) -> Held:
    """A matrix on the rank at a place among those that share it."""
    ours, shape, peers = request.optimizer, (share.shape[0], share.shape[1]), None
    at = index if share.shared else 0
    if share.shared:
        # One object for each group of ranks, as there is one of torch's; those of stacks have their own.
        group = groups.setdefault((tuple(share.ranks), share.stack), object())
        peers = Peers(group, share.ranges, index, share.columns, share.turn)
    columns = share.columns[at] if share.columns else None
    interval = RowInterval(share.name, shape, *share.ranges[at], columns)
    lengths = {Axis.ROWS: interval.rows, Axis.COLUMNS: 0, Axis.ALL_COLUMNS: shape[1]}
    statistics = sum(lengths[spec.axis_of(name)] for name in ours.vectors)
    ranks, widened = tuple(ours.ranks.values()), forms.smaller(ours.ranks, ours.forms)
    outline = batching.outline(interval, peers, ranks, statistics, FP32, share.before, widened=widened)
    return Held(outline, interval, peers, share.call)
