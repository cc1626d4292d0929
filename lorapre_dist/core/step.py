"""The step of every optimizer on row intervals: local phases with collectives between them.

Notation as in ``reference.py``. A rank holds rows ``R_k`` of ``B`` and a block of the columns of ``A``. Per matrix and
moment:

    gather   A whole, from its blocks, and how large the gradient is; where ranks hold columns of the same rows, all of
             these rows of B, of which each keeps some
    edge     sums over rows cut between ranks: one small all-reduce
    local    block by block of rows: update theta, Y = g A^+, new B[R_k], Z = B^T g
    reduce   Z to its blocks
    ----     what follows changes factors alone, for a wave of buckets at once
    solve    S = B^T B, summed on one rank, which sends (S + d)^-1 to all
    refresh  A <- (1 - gamma) A + gamma (S + d)^-1 Z on this rank's block
    gauge    A A^T, summed on one rank, which sends its factor L to all; A <- L^-1 A, B <- B L, so that A has
             orthonormal rows and A^+ is A^T (not in ``paper``, which solves with ``A A^T`` before ``edge``)

A matrix that one rank owns whole takes the same path without the collectives. What differs between optimizers is a
:class:`Rule`.

All before the line is what theta waits for, but for the reduction of Z. With ``overlap`` the rest runs behind what
comes after the step (:class:`Behind`), and gathers the new A for the next one as well. How large gradients are has been
exchanged before the step then (:func:`exchange.look`), so that of all this the weights wait for the sums of cut rows
alone. In Muon the update, which makes the momentum orthogonal, has collectives of its own, and the weights wait for
those, too; in ``paper`` the inverse of ``A A^T`` is worked out ahead as A is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from . import at_rest, batching, dealing, exchange, gauge, regression, stacks
from .background import Background
from .batching import Limits
from .comm import Comm
from .exchange import Item, Work
from .factors import Ahead, Matrix
from .guard import Go
from .refresh import damped_inverses
from .regression import Block, Regression
from .workspace import Workspace


class Rule(Protocol):
    """One optimizer's settings of a parameter group at one step, and what it does with them."""

    @property
    def regression(self) -> Regression:
        """How its factors follow the gradient."""

    @property
    def decay(self) -> Any:
        """What weights lose in a step, beside the update: a number, or 0-d."""

    @property
    def boundary_sums(self) -> int:
        """Numbers that are summed for each row that is cut between ranks, beside ``Y``."""

    @property
    def boundary_largest(self) -> bool:
        """Whether it is not their sum over ranks that is asked for, but the largest."""

    @property
    def per_element(self) -> int:
        """Numbers per element of a matrix that it keeps from the first block to :meth:`finish`."""

    def sum_boundary(self, work: Work, workspace: Workspace) -> None:
        """Add this rank's part of the sums over cut rows to ``work.edge``, ``Y`` apart."""

    def begin(self, work: Work, workspace: Workspace) -> None:
        """Before the first block, with the sums over all ranks in ``work.edge``."""

    def update_block(self, work: Work, block: Block, workspace: Workspace) -> None:
        """Update theta, from the old factors; then ``B`` and ``Z`` (:func:`regression.refresh_rows`)."""

    def finish(self, works: list[Work], comm: Comm, workspace: Workspace) -> None:
        """After all blocks of a bucket; a collective."""


@dataclass
class Behind:
    """Where the rest of a step runs, once the weights are stepped; with collectives and buffers of its own."""

    background: Background
    comm: Comm
    workspace: Workspace


@dataclass
class Prepared:
    """A bucket before its weights are stepped: runs of matrices, each a stack, and ``summed``, which waits for sums."""

    runs: list[list[Item]]
    works: list[Work]
    summed: exchange.Wait


def step(items: list[Item], rule: Rule, comm: Comm, workspace: Workspace, behind: Behind | None = None) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items.

    Args:
        behind: where what follows the update of theta runs, when this has returned; all is on one device then, and the
            caller has waited for what runs there on these matrices.
    """
    if not items:
        return
    outlines = [item.matrix.outline for item in items]
    limits = Limits.of(workspace, items[0].theta.device.type, rule.per_element * outlines[0].itemsize)
    plan = batching.plan(outlines, limits, [stacks.kind(item) for item in items])
    waves = [[[[items[k] for k in run] for run in bucket] for bucket in wave] for wave in plan]
    exchange.size_own(items)
    if behind is not None:
        _step_ahead(waves, rule, comm, workspace, behind)
        return
    for wave in waves:
        works: list[Work] = []
        for k, runs in enumerate(wave):
            # What is not reduced into other memory has to stay until the end of the wave.
            stays = any(run[0].matrix.lends for run in runs)
            bucket = _prepare(runs, rule, comm, workspace)
            _update(bucket, rule, comm, workspace, f"Z {k}" if stays else "Z")
            _reduce(bucket.works, rule.regression, comm)
            for run, work in zip(runs, bucket.works, strict=True):
                if len(run) > 1:  # a copy, and what follows is of factors alone
                    work.put_down()
            works += bucket.works
        _refresh(works, rule.regression, comm, workspace)


def _step_ahead(
    waves: list[list[list[list[Item]]]], rule: Rule, comm: Comm, workspace: Workspace, behind: Behind
) -> None:
    """The same with all that theta waits for first: sums of all buckets are under way at once. The rest is given away.

    Collectives and solves are of the same matrices, so that the result has the same bits.
    """
    prepared = [[_prepare(runs, rule, comm, workspace) for runs in wave] for wave in waves]
    for bucket in (bucket for wave in prepared for bucket in wave):
        for run, work in zip(bucket.runs, bucket.works, strict=True):
            if len(run) > 1:  # a copy, of which not all shall be there at once
                work.put_down()
    how = rule.regression
    for wave in prepared:
        for bucket in wave:
            for run, work in zip(bucket.runs, bucket.works, strict=True):
                work.item.theta, work.item.grad = stacks.elements(run)
            _update(bucket, rule, comm, workspace, None)
        owners = [[[item.matrix for item in run] for run in bucket.runs] for bucket in wave]
        works = [bucket.works for bucket in wave]
        go = works[0][0].item.go
        go = Go(go.value, go.sure)  # which keeps what is made of it: on a stream that is of use there alone
        for work in (work for some in works for work in some):
            work.put_down()
            work.item.go = go
        wave.clear()
        behind.background.run(
            _Rest(works, owners, how, behind),
            [matrix for bucket in owners for run in bucket for matrix in run],
            [tensor for some in works for work in some for tensor in _handed_over(work)],
            works[0][0].item.theta.device,
        )


@dataclass
class _Rest:
    """What is left of a wave when its weights are stepped; then what the next step needs of the new factors."""

    buckets: list[list[Work]]
    owners: list[list[list[Matrix]]]
    how: Regression
    behind: Behind

    def __call__(self) -> None:
        comm, workspace = self.behind.comm, self.behind.workspace
        for works in self.buckets:
            _reduce(works, self.how, comm)
        _refresh([work for works in self.buckets for work in works], self.how, comm, workspace)
        for works, owners in zip(self.buckets, self.owners, strict=True):
            _prepare_next(works, owners, self.how, comm, workspace)


def _handed_over(work: Work) -> list[Tensor]:
    """Tensors that a step has made for what follows it."""
    size = [x for x in (work.size.inverse, work.size.largest) if x is not None]
    rows = [moment.factors.B for moment in work.moments] if work.matrix.rest is not None else []
    return [work.item.go.value, *size, *(moment.Z for moment in work.moments), *_grams_of_B(work), *rows]


def _grams_of_B(work: Work) -> list[Tensor]:
    return [moment.S for moment in work.moments if hasattr(moment, "S")]


def _prepare(runs: list[list[Item]], rule: Rule, comm: Comm, workspace: Workspace) -> Prepared:
    """All that is exchanged before theta is updated."""
    stacked = [at_rest.widen(stacks.stacked(run)) for run in runs]
    works = exchange.gather(stacked, comm, rule.boundary_sums)
    for work in works:
        work.matrix.taken.add_(work.item.go.value)
        _sum_boundary(work, rule, workspace)
    if not rule.regression.stable:
        _invert_grams_of_A(works, rule.regression, comm, workspace)
    return Prepared(runs, works, exchange.sum_edges(works, comm, rule.boundary_largest))


def _update(bucket: Prepared, rule: Rule, comm: Comm, workspace: Workspace, label: str | None) -> None:
    """Update theta and the rows of B, and form this rank's part of Z."""
    works, how = bucket.works, rule.regression
    bucket.summed()
    regression.make_room(works, workspace, label)
    for work in works:
        for moment in work.moments:
            if moment.inverse is not None and moment.Y.shape[1]:
                moment.Y.copy_(moment.Y @ moment.inverse)
        if not how.stable:
            regression.row_grams(work)
        rule.begin(work, workspace)
        for block in regression.blocks(work, workspace):
            rule.update_block(work, block, workspace)
    rule.finish(works, comm, workspace)
    exchange.keep_rows(works, statistics=True)
    for run, work in zip(bucket.runs, works, strict=True):
        stacks.unstack(work.item, run)
        work.release()


def _reduce(works: list[Work], how: Regression, comm: Comm) -> None:
    """This rank's block of Z, and of the new B what ``stable`` solves with."""
    if how.stable:
        for work in works:
            regression.row_grams(work)
    exchange.keep_rows(works, statistics=False)
    exchange.reduce(works, comm)


def _sum_boundary(work: Work, rule: Rule, workspace: Workspace) -> None:
    """This rank's part of what is summed over cut rows."""
    if work.cut:
        of = [lambda g: g, Tensor.abs]  # the moments are those of g and of |g|
        for block in regression.blocks(work, workspace, cut_only=True):
            g = regression.gradient(work, block)
            for moment, take in zip(work.moments, of, strict=False):
                moment.Y[:, block.lines] += take(g) @ moment.A[..., block.held].mT
    rule.sum_boundary(work, workspace)


def _invert_grams_of_A(works: list[Work], how: Regression, comm: Comm, workspace: Workspace) -> None:
    """``(A A^T + d)^-1`` where A has no orthonormal rows, unless it was worked out ahead."""
    keys = _solved_with(works, how)
    # What was solved together is solved together again, though one of it alone is lacking: the last bits depend on it.
    stale = {of for work, of in zip(works, keys, strict=True) if not _inverted_ahead(work, of)}
    lacking = [work for work, of in zip(works, keys, strict=True) if of in stale]
    for work in (work for work, of in zip(works, keys, strict=True) if of not in stale):
        for moment in work.moments:
            moment.inverse = None if moment.factors.ahead is None else moment.factors.ahead.inverse
    found = _inverses(lacking, gauge.grams_of_A(lacking), how, comm, "A", workspace)
    for work, some in zip(lacking, found, strict=True):
        for moment, inverse in zip(work.moments, some, strict=True):
            moment.inverse = inverse


def _inverted_ahead(work: Work, of: tuple[object, ...]) -> bool:
    """Whether the inverses of a work were worked out ahead, together with the same matrices."""
    ahead = [moment.factors.ahead for moment in work.moments]
    return all(one is not None and one.inverse is not None and one.of == of for one in ahead)


def _solved_with(works: list[Work], how: Regression) -> list[tuple[object, ...]]:
    """What decides the last bit of each work's inverses: the damping, and what is summed and solved with it."""
    groups = [None if work.matrix.peers is None else id(work.matrix.peers.group) for work in works]
    each = [(work.matrix.interval.name, len(work.item.theta)) for work in works]
    alike = {group: tuple(one for one, g in zip(each, groups, strict=True) if g == group) for group in groups}
    return [(how.damping, alike[group]) for group in groups]


def _prepare_next(
    works: list[Work], owners: Sequence[Sequence[Matrix]], how: Regression, comm: Comm, workspace: Workspace
) -> None:
    """Gather the new A, and in ``paper`` invert its Gram, as the next step of these matrices would do first."""
    wholes = exchange.gather_ahead(works, comm)
    of = _solved_with(works, how)
    if not how.stable:
        _invert_grams_of_A(works, how, comm, workspace)
    for work, run, some, key in zip(works, owners, wholes, of, strict=True):
        for name, moment, whole in zip(work.matrix.factors, work.moments, some, strict=True):
            if whole is None and moment.inverse is None:
                continue
            for k, matrix in enumerate(run):
                A, inverse = (None if x is None else x[k] for x in (whole, moment.inverse))
                matrix.factors[name].ahead = Ahead(A, inverse, key)


def _refresh(works: list[Work], how: Regression, comm: Comm, workspace: Workspace) -> None:
    """The refresh of A; in ``stable`` back to the gauge. Of rank 0 there is nothing to refresh."""
    if not any(work.matrix.low_rank for work in works):
        return
    grams = [[moment.S for moment in work.moments] for work in works]
    regression.refresh_columns(works, _inverses(works, grams, how, comm, "B", workspace), how)
    if how.stable:
        gauge.regauge(works, how.damping, comm, workspace)
    at_rest.round_back(works, workspace)


def _inverses(
    works: list[Work], grams: list[list[Tensor]], how: Regression, comm: Comm, of: str, workspace: Workspace
) -> list[list[Tensor]]:
    """The damped inverses of the Grams of A or B."""

    def solved(some: Tensor) -> Tensor:
        return damped_inverses(some, how.damping, relative=how.stable)

    names = f"reduce Gram of {of}", f"send inverse of {of}"
    return dealing.deal_out(works, grams, solved, lambda every: every, comm, names, workspace.bucket)
