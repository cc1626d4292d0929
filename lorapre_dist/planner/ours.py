"""What our optimizers keep, allocate, send and compute on each rank, as ``core/`` states it of itself."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorapre_dist.config import LowRankConfig
from lorapre_dist.core import arithmetic, batching, forms, owning, spec, traffic
from lorapre_dist.core.arithmetic import Work
from lorapre_dist.core.batching import Limits
from lorapre_dist.core.interval import Peers, Range, RowInterval, column_block, row_blocks
from lorapre_dist.core.rules import needs as rules
from lorapre_dist.core.rules.muon import cuts as muon_cuts
from lorapre_dist.core.rules.needs import Needs
from lorapre_dist.core.sizes import Sizes
from lorapre_dist.core.spec import Axis
from lorapre_dist.core.traffic import Collective, Held, Moved
from lorapre_dist.layouts.geometry.shares import Arrangement, Share

from .request import FP32, Parameter, Part, Request
from .rivals import Array, Costs, is_matrix, numel, over_ranks, zeros


def costs(request: Request, arrangement: Arrangement) -> Costs:
    """Of the request's optimizer."""
    state = state_bytes(request, arrangement)
    found = Costs(state, zeros(arrangement), Work(), kept=zeros(arrangement))
    kinds: dict[LowRankConfig, list[Share]] = {}
    for share in arrangement.shares:
        if (settings := request.stepped_as(share)) is not None:
            kinds.setdefault(settings, []).append(share)
    vectors: Any = sum(over_ranks(arrangement, s, numel(s)) for s in arrangement.shares if not request.stepped_as(s))
    ranks, sent = looked_at(arrangement, int(np.argmax(state)), request.optimizer.work == "rows"), _Sent(arrangement)
    # In the order in which they are stepped: the projections, then what has other settings, by their rank.
    for settings in sorted(kinds, key=lambda one: (one != request.optimizer, one.rank)):
        _add(found, sent, request, arrangement, settings, held(request, arrangement, ranks, settings, kinds[settings]))
    for rank, work in sent.work.items():
        work.add(Work(moved=7.0 * FP32 * int(vectors[rank] if np.ndim(vectors) else vectors), calls=10))
        if work.products + work.moved > found.work.products + found.work.moved:
            found.work = work
    found.calls = max(sent.calls.values(), default=0)
    found.sent = dict(sent.bytes) | _agreed(request, arrangement)
    return found


class _Sent:
    """What adds up over the kinds of matrices: bytes by purpose on each rank; of some ranks collectives and work."""

    def __init__(self, arrangement: Arrangement) -> None:
        self.bytes: dict[str, Array] = defaultdict(lambda: zeros(arrangement))
        self.calls: dict[int, int] = defaultdict(int)
        self.work: dict[int, Work] = defaultdict(Work)


def _add(
    found: Costs,
    sent: _Sent,
    request: Request,
    arrangement: Arrangement,
    settings: LowRankConfig,
    mine: dict[int, list[Held]],
) -> None:
    """Add what the matrices of some settings take; ``mine`` on each rank that is looked at."""
    needs, kind, stable = rules.of(settings), request.device, settings.variant == "stable"
    limits = Limits.of(needs.sizes, kind, needs.per_element * FP32)
    ranks, whole = list(mine), settings.work == "matrices" and settings == request.optimizer
    for rank, after in zip(ranks, [*ranks[1:], arrangement.size], strict=True):
        matrices, same = mine[rank], slice(None) if arrangement.uniform and not whole else slice(rank, after)
        moving, steps = divided(matrices, needs.sizes, kind) if whole else ([], [matrices])
        outlines = [[m.outline for m in some] for some in steps]
        kept = max(batching.kept_bytes(some, needs.sizes, kind, needs.per_element * FP32) for some in outlines)
        workspace = workspace_bytes(matrices, needs, kind)
        if whole:
            of_step = functools.partial(workspace_bytes, needs=needs, kind=kind)
            moved = matrices, [m.moved.there + m.moved.back for m in matrices], needs.sizes, kind
            workspace, kept = owning.workspace_bytes(*moved, of_step), kept + owning.buffer_bytes(*moved)
        if request.optimizer.overlap:  # as memory_report() states it
            more = sum(batching.overlap_bytes(one, not stable) for some in outlines for one in some)
            workspace = kept = 2 * workspace + more
        found.workspace[same] = np.maximum(found.workspace[same], workspace)
        found.kept[same] = np.maximum(found.kept[same], kept)
        for one in [*moving, *(c for some in steps for c in traffic.collectives(some, needs, limits, stable, kind))]:
            sent.calls[rank] += one.calls
            if not arrangement.uniform:
                sent.bytes[one.purpose][same] += one.at(one.peers.index)
            elif rank == ranks[0]:  # of all ranks
                sent.bytes[one.purpose] += one.bytes
                for index, more in one.more.items():
                    sent.bytes[one.purpose][index] += more
                if one.each:
                    sent.bytes[one.purpose] += np.asarray(one.each, np.int64)
        for some in steps:
            sent.work[rank].add(arithmetic.of_step(some, needs, limits, stable, kind))
        for one in moving:  # what leaves is packed, and as much unpacked
            sent.work[rank].add(Work(moved=4.0 * one.at(one.peers.index), calls=4 * one.calls))


def divided(matrices: list[Held], sizes: Sizes, kind: str) -> tuple[list[Collective], list[list[Held]]]:
    """A rank's step by matrices: what moves, and what it steps one after the other."""
    moving, steps = list[Collective](), [[m for m in matrices if not owning.goes(m)]]
    for call in sorted({m.call for m in matrices}):
        some = [m for m in matrices if m.call == call]
        for of_round in owning.rounds(some, [m.moved.there + m.moved.back for m in some], sizes, kind):
            guests = [(some[k], owner) for k, owner in of_round]
            moving += traffic.moving(guests)
            mine = [m for m, owner in guests if m.peers is not None and m.peers.index == owner]
            steps.append([owning.whole(m, call) for m in mine])
    return moving, steps


def _agreed(request: Request, arrangement: Arrangement) -> dict[str, Array]:
    """What is sent beside the steps of matrices: whether to step, by all stages or none, and under DDP the results."""
    found, part = {}, request.part or Part()
    tensors, data = len(request.parameters), arrangement.size // request.tensor
    if not request.layout.startswith("zero"):
        groups = [data, request.tensor]
        if request.expert > 1:
            groups += [request.expert, request.world_size // request.expert]
        agreed = sum(traffic.agreeing(tensors, n) for n in groups)
        beyond = part.stages * request.world_size if part.stages > 1 else 1
    else:  # DeepSpeed's optimizers look at gradients themselves; under ZeRO-0 in fp32 there is none
        agreed, alone = 0, request.layout == "zero0" and request.precision == "fp32"
        beyond = part.stages * request.tensor if alone else 1
    if agreed + beyond > 1:
        found["finite"] = zeros(arrangement) + agreed + traffic.agreeing(0, beyond)
    if arrangement.steps:
        found["broadcast parameters"] = request.stepped * np.asarray(arrangement.steps, np.int64)
    return found


def state_bytes(request: Request, arrangement: Arrangement) -> Array:
    """Bytes of state on each rank, by the tensors that it consists of."""
    vector, total = spec.of_vector(), zeros(arrangement)
    beside = sum(one.bytes(1) for one in spec.of_rounding(request.optimizer.weights).values())
    for share in arrangement.shares:
        kept = request.kept_as(share.name, share.shape) if len(share.shape) == 2 else None
        if kept is not None:
            lengths = {Axis.ELEMENTS: numel(share)}
            lengths |= _lengths((share.shape[0], share.shape[1]), share.ranges, share.columns)
            matrix = spec.of_matrix(kept.ranks, kept.vectors, kept=kept.forms)
            size = sum(one.bytes(1) * lengths[one.axis] for one in matrix.values())
        else:
            size = sum(one.bytes(1) * numel(share) for one in vector.values())
        total += over_ranks(arrangement, share, size + beside * numel(share))
    return total


@functools.lru_cache(maxsize=1024)  # matrices of a few shapes lie alike, and there may be thousands of ranks
def _lengths(shape: tuple[int, int], ranges: tuple[Range, ...], columns: tuple[Range, ...] | None) -> dict[Axis, Array]:
    """How long a matrix's state is on each rank, by axis."""
    parts, q = len(ranges), shape[1]
    blocks = [column_block(q, parts, k) for k in range(parts)]
    return {
        Axis.ROWS: np.array([last - first for first, last in row_blocks(ranges, columns, q)], np.int64),
        Axis.COLUMNS: np.array([last - first for first, last in blocks], np.int64),
        Axis.ALL_COLUMNS: np.full(parts, q, np.int64),
    }


def workspace_bytes(matrices: Sequence[owning.Lies], needs: Needs, kind: str) -> int:
    """Bound on what a step on a rank's matrices allocates for itself."""
    more, limit = None, needs.sizes.block_on(kind)
    if needs.iterations:
        more = [muon_cuts.transient_bytes(m.interval.shape, m.peers, FP32, needs.iterations, limit) for m in matrices]
    outlines = [m.outline for m in matrices]
    return batching.workspace_bytes(outlines, needs.sizes, kind, needs.per_element * FP32, more) if matrices else 0


#: So many parts of matrices are looked at on all ranks together, at most.
MOST = 5_000


def looked_at(arrangement: Arrangement, fullest: int, alike: bool = True) -> list[int]:
    """The ranks whose matrices are looked at, each of which stands for those up to the next one, too.

    All of them, as far as :data:`MOST` allows; the fullest one alone where all take part in everything.

    Args:
        alike: those that take part in everything do the same.
    """
    if arrangement.uniform and alike:
        return [fullest]
    every = -(-sum(len(share.ranks) for share in arrangement.shares if len(share.shape) == 2) // MOST)
    return sorted({*range(0, arrangement.size, max(1, every)), fullest})


def held(
    request: Request,
    arrangement: Arrangement,
    ranks: list[int],
    settings: LowRankConfig | None = None,
    shares: list[Share] | None = None,
) -> dict[int, list[Held]]:
    """The matrices of each of some ranks in the order of the step: of some settings, by default the projections."""
    found: dict[int, list[Held]] = {rank: [] for rank in ranks}
    groups: dict[Hashable, object] = {}
    if shares is None:
        shares = [share for share in arrangement.shares if is_matrix(request, share)]
    for share in shares:
        whole = len(share.ranks) == arrangement.size  # place and rank are the same
        places = zip(ranks, ranks, strict=True) if whole else enumerate(share.ranks)
        for index, rank in places:
            if rank in found:
                found[rank].append(_held(settings or request.optimizer, share, index, groups, request.stepped))
    return found


def _held(ours: LowRankConfig, share: Share, index: int, groups: dict[Hashable, object], stepped: int) -> Held:
    """A matrix on the rank at a place among those that share it."""
    shape, peers = (share.shape[0], share.shape[1]), None
    at = index if share.shared else 0
    if share.shared:
        # One object for each group of ranks, as there is one of torch's; those of stacks have their own.
        group = groups.setdefault((tuple(share.ranks), share.stack), object())
        peers = Peers(group, share.ranges, index, share.columns, share.turn)
    columns = share.columns[at] if share.columns else None
    interval = RowInterval(share.name, shape, *share.ranges[at], columns)
    low, high = row_blocks(share.ranges, share.columns, shape[1])[at]
    lengths = {Axis.ROWS: high - low, Axis.COLUMNS: 0, Axis.ALL_COLUMNS: shape[1]}
    statistics = sum(lengths[spec.axis_of(name)] for name in ours.vectors)
    ranks, widened = tuple(ours.ranks.values()), forms.smaller(ours.ranks, ours.forms)
    of_rows = sum(spec.axis_of(name) is Axis.ROWS for name in ours.vectors)
    of = interval, peers, ranks, statistics, FP32, share.before
    outline = batching.outline(*of, widened=widened, row_statistics=of_rows)
    return Held(outline, interval, peers, share.call, _moved(ours, stepped))


@functools.lru_cache(maxsize=64)
def _moved(ours: LowRankConfig, stepped: int) -> Moved:
    """What moves of a matrix of weights of so many bytes."""
    state = spec.of_matrix(ours.ranks, ours.vectors, kept=ours.forms)
    of = {axis: sum(one.bytes(1) for one in state.values() if one.axis is axis) for axis in Axis}
    types = {one.dtype for one in state.values()} | {{4: "float32", 2: "bfloat16"}[stepped]}
    return Moved(stepped, FP32, of[Axis.ROWS], of[Axis.COLUMNS], of[Axis.ALL_COLUMNS], len(types))


@dataclass(frozen=True)
class Released:
    """Where gradients are released, bytes on the rank that has most.

    Attributes:
        together: of the gradients that are stepped together, and ``workspace`` of it: the batch that takes most.
        waiting: of those that wait for a batch while FSDP2 reduces the last ones, which are in no layer; None where
            each is complete by itself.
    """

    together: int = 0
    workspace: int = 0
    waiting: int | None = None


def released(request: Request, arrangement: Arrangement) -> Released:
    """Batches are formed as the backward pass goes, from the last parameter to the first.

    Under FSDP2 all of a layer's gradients are complete at once, and what is in no layer comes at the end.
    """
    rank = 0 if arrangement.uniform else int(np.argmax(state_bytes(request, arrangement)))
    mine: dict[str, tuple[LowRankConfig, Held]] = {}
    for settings in {s for share in arrangement.shares if (s := request.stepped_as(share)) is not None}:
        shares = [share for share in arrangement.shares if request.stepped_as(share) == settings]
        for one in held(request, arrangement, [rank], settings, shares)[rank]:
            mine.setdefault(one.interval.name, (settings, one))
    worst, batches = (0, 0), list(_batches(request))
    for batch in batches:
        of: dict[LowRankConfig, list[Held]] = defaultdict(list)
        for p in batch:
            for name in [p.name, *(f"{p.name}[{e}]" for e in range(p.shape[0] if len(p.shape) == 3 else 0))]:
                if name in mine:
                    of[mine[name][0]].append(mine[name][1])
        workspace = max((workspace_bytes(some, rules.of(s), request.device) for s, some in of.items()), default=0)
        vectors = 6 * Sizes().block  # AdamW's parts
        worst = max(worst, (_gradients(request, batch), max(workspace, vectors)), key=sum)
    if not request.in_units:
        return Released(*worst)
    last = {p.name for p in request.wrapped().get("", ())}
    beside = next((batch for batch in reversed(batches) if batch), [])
    return Released(*worst, _gradients(request, [p for p in beside if p.name not in last]))


def _gradients(request: Request, batch: list[Parameter]) -> int:
    """Bytes of the reduced gradients of these parameters on a rank."""
    return -(-request.stepped * sum(p.numel for p in batch) // (request.sharing if request.in_units else 1))


def _batches(request: Request) -> Iterator[list[Parameter]]:
    """Parameters whose gradients are stepped together in the backward pass (``optimizers/release.py``)."""
    order = [[p] for p in reversed(request.parameters)]
    if request.in_units:
        units = request.wrapped()
        rest = units.pop("", [])
        order = [*reversed(units.values()), rest]
    limit, waiting = Sizes().bucket_on(request.device), list[Parameter]()
    for unit in order:
        waiting += unit
        if request.stepped * sum(p.numel for p in waiting) >= limit:
            yield waiting
            waiting = []
    yield waiting
