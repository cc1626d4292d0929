"""The step of every optimizer on row intervals: local phases with collectives between them.

Notation as in ``reference.py``. A rank holds rows ``R_k`` of ``B`` and a block of the columns of ``A``. Per matrix and
moment:

    gather   A whole, from its blocks, and how large the gradient is
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
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from . import at_rest, batching, exchange, gauge, regression, stacks
from .batching import Bucket, Limits
from .comm import Comm
from .exchange import Item, Work
from .refresh import damped_inverses
from .regression import Block, Regression
from .workspace import Workspace


class Rule(Protocol):
    """One optimizer's settings of a parameter group at one step, and what it does with them."""

    @property
    def regression(self) -> Regression:
        """How its factors follow the gradient."""

    @property
    def boundary_sums(self) -> int:
        """Numbers that are summed for each row that is cut between ranks, beside ``Y``."""

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


def step(items: list[Item], rule: Rule, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    if not items:
        return
    outlines = [item.matrix.outline for item in items]
    limits = Limits.of(workspace, items[0].theta.device.type, rule.per_element * outlines[0].itemsize)
    for wave in batching.plan(outlines, limits, [stacks.kind(item) for item in items]):
        works: list[Work] = []
        for k, bucket in enumerate(wave):
            # What is not reduced into other memory has to stay until the end of the wave.
            stays = any(items[run[0]].matrix.lends for run in bucket)
            works += _update(bucket, items, rule, comm, workspace, f"Z {k}" if stays else "Z")
        _refresh(works, rule.regression, comm, workspace)


def _update(bucket: Bucket, items: list[Item], rule: Rule, comm: Comm, workspace: Workspace, label: str) -> list[Work]:
    """Update theta, the rows of B, and this rank's block of Z."""
    how, runs = rule.regression, [[items[k] for k in run] for run in bucket]
    found = [stacks.stacked(run) for run in runs]
    works = exchange.gather([at_rest.widen(stack) for stack in found], comm, rule.boundary_sums)
    for work in works:
        work.matrix.taken.add_(work.item.go.value)
        _sum_boundary(work, rule, workspace)
    if not how.stable:
        _invert_grams_of_A(works, how, comm, workspace)
    exchange.sum_edges(works, comm)
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
        if how.stable:
            regression.row_grams(work)
    exchange.reduce(works, comm)
    rule.finish(works, comm, workspace)
    for stack, run, work in zip(found, runs, works, strict=True):
        stacks.unstack(stack, run)
        work.release()
    return works


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
    """``(A A^T + d)^-1`` where A has no orthonormal rows."""
    found = _inverses(works, gauge.grams_of_A(works), how, comm, "A", workspace)
    for work, some in zip(works, found, strict=True):
        for moment, inverse in zip(work.moments, some, strict=True):
            moment.inverse = inverse


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
    return exchange.deal_out(works, grams, solved, lambda every: every, comm, names, workspace.bucket)
