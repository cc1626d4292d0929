"""What other optimizers keep, allocate, send and compute on each rank: one pure function an optimizer, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorapre_dist.core.arithmetic import Work
from lorapre_dist.layouts.geometry.shares import Arrangement, Share

from .request import FP32, Request

Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Costs:
    """Of a step on each rank (arrays over :attr:`Arrangement.size`).

    Attributes:
        state: bytes of optimizer state, without the weights' fp32 masters.
        workspace: bytes that a step allocates for itself, at most.
        kept: of those, what stays between steps.
        work: what a step computes, on the rank with most of it.
        sent: bytes by purpose, in a step and a ring implementation, as ``core/comm.py`` counts.
        calls: number of collectives, on the rank with most of it.
    """

    state: Array
    workspace: Array
    work: Work
    sent: dict[str, Array] = field(default_factory=dict)
    calls: int = 0
    kept: Any = 0


@dataclass(frozen=True)
class Optimizer:
    """An entry of the comparison.

    Attributes:
        costs: from the request and where the parameters lie.
        whole: it knows no layout: every rank keeps and steps all of its weights, in their own precision.
    """

    costs: Callable[[Request, Arrangement], Costs]
    whole: bool = False


def adamw(_: Request, arrangement: Arrangement) -> Costs:
    """AdamW, fused: ``exp_avg`` and ``exp_avg_sq`` in fp32, 8 bytes an element; elementwise, so it sends nothing.

    A step reads the gradient, both and theta, and writes the latter three: 28 bytes an element, in a few launches.
    """
    elements = sum((over_ranks(arrangement, s, numel(s)) for s in arrangement.shares), zeros(arrangement))
    return Costs(2 * FP32 * elements, zeros(arrangement), Work(moved=7.0 * FP32 * int(elements.max()), calls=10))


def muon(request: Request, arrangement: Arrangement) -> Costs:
    """``torch.optim.Muon`` on the matrices that ours takes, AdamW on the rest.

    A momentum in fp32: 4 p q bytes. Newton-Schulz needs whole matrices, so each of the n ranks that share one gathers
    it: (n-1)/n 4 p q. A step on a matrix holds the gathered fp32 update (4 p q), its bf16 form and a product of the
    same size (2 p q each), and two bf16 products of m x m, m = min(p, q).

    Each of the 5 iterations takes 4 m p q + 2 m^3 flops, moves about 6 p q + 8 m^2 numbers and starts 3 operations.
    """
    state, gathered, workspace = zeros(arrangement), zeros(arrangement), zeros(arrangement)
    products, moved, calls = zeros(arrangement), zeros(arrangement), zeros(arrangement)
    shared = 0
    for share in arrangement.shares:
        low_rank = is_matrix(request, share)
        held = numel(share)
        state += over_ranks(arrangement, share, (FP32 if low_rank else 2 * FP32) * held)
        moved += over_ranks(arrangement, share, (5 if low_rank else 7) * FP32 * held)
        if low_rank:
            size, parts, m = share.numel, len(share.ranges), min(share.shape)
            shared += parts > 1
            gathered += over_ranks(arrangement, share, round(FP32 * size * (parts - 1) / parts))
            workspace = np.maximum(workspace, over_ranks(arrangement, share, 8 * size + 4 * m * m))
            products += over_ranks(arrangement, share, 5 * (4 * m * size + 2 * m**3))
            moved += over_ranks(arrangement, share, 2 * 5 * (6 * size + 8 * m * m))
            calls += over_ranks(arrangement, share, 5 * 3 + 8)
    work = Work(float(products.max()), 0, float(moved.max()), float(calls.max()) + 10)
    return Costs(state, workspace, work, {"gather updates": gathered} if gathered.any() else {}, shared)


def galore(request: Request, arrangement: Arrangement) -> Costs:
    """GaLore as ``galore-torch`` 1.0 does it (``GaLoreAdamW``, ``proj_type="std"``), which knows no sharded layout.

    All state in the weights' own precision, e bytes. A p x q matrix: a projector on its smaller side, min(p, q) r, and
    two moments of the projected gradient, 2 max(p, q) r; elsewhere Adam's 2 numbers an element. A step on a matrix
    holds the SVD in fp32 of the gradient (4 p q, and 4 m (p + q) for its vectors, m = min(p, q)), or the update
    projected back (e p q), which is less.

    Computing: the projection and its way back, 4 p q r flops; the SVD of one step in 200 is left out.
    """
    rank, width = request.optimizer.rank, request.width
    elements = largest = 0
    work = Work()
    for share in arrangement.shares:
        if is_matrix(request, share):
            small, large = sorted(share.shape)
            elements += rank * (small + 2 * large)
            largest = max(largest, FP32 * (small * large + small * (small + large)))
            work.add(Work(4.0 * share.numel * rank, 0, width * (7.0 * share.numel + 12 * large * rank), 14))
        else:
            elements += 2 * share.numel
            work.add(Work(moved=7.0 * width * share.numel, calls=8))
    return Costs(zeros(arrangement) + width * elements, zeros(arrangement) + largest, work)


#: The comparison, in the order of the table.
RIVALS: dict[str, Optimizer] = {"AdamW": Optimizer(adamw), "Muon": Optimizer(muon), "GaLore": Optimizer(galore, True)}


def zeros(arrangement: Arrangement) -> Array:
    """One for each rank."""
    return np.zeros(arrangement.size, np.int64)


def over_ranks(arrangement: Arrangement, share: Share, values: Any) -> Array:
    """``values``, one for each of the share's ranks, as an array over all ranks."""
    found = zeros(arrangement)
    found[list(share.ranks) if len(share.ranks) < arrangement.size else slice(None)] = values
    return found


def numel(share: Share) -> Any:
    """Elements on each of a share's ranks, or on all of them alike."""
    return share.numels if share.shared else share.numel


def is_matrix(request: Request, share: Share) -> bool:
    """Whether it is a low-rank matrix."""
    return len(share.shape) == 2 and request.takes(share.name, share.shape)
