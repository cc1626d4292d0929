"""LoRA-Pre (Adam form) on row intervals: a handful of local phases with collectives between them.

Notation as in ``reference.py``; ``At`` is ``A`` transposed (q x r). A rank holds rows ``R_k`` of ``B`` and a block
of the rows of ``At``. Per matrix and moment:

    gather   At whole, from its blocks
    edge     sums over rows cut between ranks, and the Gram ``A A^T``: one small all-reduce
    local    block by block of rows: update theta, Y = g At (A A^T + d)^-1, new B[R_k], Z = g^T B
    reduce   Z to its blocks, S = B^T B over rows
    refresh  At <- (1 - gamma) At + gamma Z (S + d)^-1 on this rank's block

A matrix that one rank owns whole takes the same path without the collectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import exchange
from .comm import Comm
from .exchange import Item, Moment, Work
from .factors import Matrix
from .interval import Segment
from .refresh import damped_inverses
from .workspace import Workspace

# Mean eigenvalue of ``A A^T`` below which ``A`` is brought back to size: far below what training comes to.
TINY = 1e-12


@dataclass(frozen=True)
class Hyper:
    """Settings of one parameter group at one step; see :class:`lorapre_dist.config.LoRAPreConfig`."""

    lr: float
    betas: tuple[float, float]
    gammas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float
    residual: float
    damping: float
    max_update: float
    stable: bool


def step(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    for bucket in buckets([item.matrix for item in items], workspace.bucket):
        _step_bucket(items[bucket], hyper, comm, workspace)


def buckets(matrices: list[Matrix], limit: int) -> Iterator[slice]:
    """Runs of consecutive matrices whose transient factors fit in ``limit`` bytes (at least one matrix each).

    Every group of peers sees its matrices in the same order and of the same size, so where a group shares several
    matrices (it then shares all of them) its ranks cut the list at the same places.
    """
    begin, used = 0, 0
    for k, matrix in enumerate(matrices):
        size = transient_bytes(matrix)
        if k > begin and used + size > limit:
            yield slice(begin, k)
            begin, used = k, 0
        used += size
    if matrices:
        yield slice(begin, len(matrices))


def transient_bytes(matrix: Matrix) -> int:
    """Bytes of one matrix in a step: gathered factors, their gradients, packed collectives, Grams and inverses."""
    r, rv = matrix.m.B.shape[1], matrix.v.B.shape[1]
    q = matrix.block_size * matrix.parts
    factors = (1 if matrix.peers is None else 5) * q * (r + rv)
    return (factors + 4 * (r * r + rv * rv)) * matrix.m.B.element_size()


def _step_bucket(items: list[Item], hyper: Hyper, comm: Comm, workspace: Workspace) -> None:
    for item in items:
        item.matrix.step += 1
    works = exchange.gather(items, comm)
    for work in works:
        _edge_sums(work, hyper, workspace)
    exchange.sum_edges(works, comm)
    if hyper.stable:  # damping is relative there, so that the factors' size does not matter
        _rescale(works)
    _invert(works, hyper)
    for work in works:
        _local_pass(work, hyper, workspace)
    exchange.reduce(works, comm)
    _refresh(works, hyper)


def _edge_sums(work: Work, hyper: Hyper, workspace: Workspace) -> None:
    """This rank's part of the sums over cut rows, and of the Grams of ``A``."""
    for moment in work.moments:
        moment.gram = moment.factors.At.T @ moment.factors.At
    interval, beta2, r = work.matrix.interval, hyper.betas[1], work.m.rank
    for segment in interval.segments():
        if segment.row not in work.cut:
            continue
        columns, grad = slice(segment.col, segment.col_stop), _view(work.item.grad, segment)
        size = workspace.rows(segment.rows, segment.col_stop - segment.col, work.m.At)
        for low in range(0, segment.rows, size):
            g = grad[low : low + size].to(work.m.At.dtype)
            first = segment.row - interval.first_row + low
            u = work.v.factors.B[first : first + g.shape[0]] @ work.v.At[columns].T
            line = work.cut[segment.row] + low
            lines = work.edge[line : line + g.shape[0]]
            lines[:, 0] += g.square().sum(1)
            lines[:, 1] += (beta2 * u.square() + (1 - beta2) * g.square()).sum(1)
            lines[:, 2 : 2 + r] += g @ work.m.At[columns]
            lines[:, 2 + r :] += g.abs() @ work.v.At[columns]


def _rescale(works: list[Work]) -> None:
    """Bring an ``A`` that has shrunk to almost nothing back to size, at the expense of ``B``; the product stays.

    At every step without gradient ``A`` shrinks by ``1 - gamma``. Were it left at 1e-17, after some hundred of them,
    the next gradient would make ``B`` so large that ``B^T B`` overflows. Powers of two, so nothing is rounded.
    """
    levels = torch.stack([moment.gram.diagonal().mean() for work in works for moment in work.moments]).tolist()
    for k, work in enumerate(works):
        r = work.m.rank
        for moment, edge, level in zip(
            work.moments, (work.edge[:, 2 : 2 + r], work.edge[:, 2 + r :]), levels[2 * k : 2 * k + 2], strict=True
        ):
            if 0 < level < TINY:
                factor = 2.0 ** round(-0.5 * math.log2(level))
                moment.gram.mul_(factor).mul_(factor)
                moment.factors.At.mul_(factor)
                moment.factors.B.div_(factor)
                edge.mul_(factor)
                if moment.At is not moment.factors.At:
                    moment.At.mul_(factor)


def _invert(works: list[Work], hyper: Hyper) -> None:
    """Invert the damped Grams of ``A``; the cut rows' Y is solved here."""
    for moments in ([w.m for w in works], [w.v for w in works]):
        inverses = damped_inverses([moment.gram for moment in moments], hyper.damping, hyper.stable)
        for moment, inverse in zip(moments, inverses, strict=True):
            moment.inverse = inverse
    for work in works:
        if work.cut:
            Y, Yv = work.edge[:, 2 : 2 + work.m.rank], work.edge[:, 2 + work.m.rank :]
            Y.copy_(Y @ work.m.inverse)
            Yv.copy_(Yv @ work.v.inverse)


def _view(flat: Tensor, segment: Segment) -> Tensor:
    return flat[segment.offset : segment.offset + segment.numel].view(segment.rows, -1)


def _local_pass(work: Work, hyper: Hyper, workspace: Workspace) -> None:
    """Update theta and ``B`` row block by row block while the gradient block is hot; sum up Z and S."""
    matrix, interval = work.matrix, work.matrix.interval
    for label, moment in zip(("W", "Wv"), work.moments, strict=True):
        if interval.rows >= interval.shape[1] and interval.columns is None:
            moment.W = workspace.take(label, interval.shape[1], moment.rank, moment.At)
            torch.mm(moment.At, moment.inverse, out=moment.W)
        shape = matrix.block_size * matrix.parts, moment.rank
        # The first block of a matrix held whole writes Z; everywhere else blocks add to it.
        moment.Zt = moment.At.new_zeros(shape) if matrix.peers else moment.At.new_empty(shape)
    if not hyper.stable:
        _row_grams(work)
    for segment in interval.segments():
        theta, grad = _view(work.item.theta, segment), _view(work.item.grad, segment)
        line = work.cut.get(segment.row)
        edges = None if line is None else work.edge[line : line + segment.rows]
        columns = slice(segment.col, segment.col_stop)
        size = workspace.rows(segment.rows, segment.col_stop - segment.col, work.m.At)
        for low in range(0, segment.rows, size):
            high = min(segment.rows, low + size)
            at = segment.row - interval.first_row
            edge = None if edges is None else edges[low:high]
            _update_block(
                work, theta[low:high], grad[low:high], slice(at + low, at + high), columns, edge, hyper, workspace
            )
    if hyper.stable:
        _row_grams(work)


def _row_grams(work: Work) -> None:
    """``S = B^T B`` over the rows that are counted here."""
    for moment in work.moments:
        owned = moment.factors.B[work.matrix.interval.first_owned :]
        moment.S = owned.T @ owned


def _update_block(
    work: Work,
    theta: Tensor,
    grad: Tensor,
    rows: slice,
    columns: slice,
    edge: Tensor | None,
    hyper: Hyper,
    workspace: Workspace,
) -> None:
    """One block: theta and grad n x c, ``rows`` of B, ``columns`` of A; ``edge`` (n x ...) if its rows are cut."""
    matrix = work.matrix
    At, vAt, B, vB = work.m.At[columns], work.v.At[columns], matrix.m.B[rows], matrix.v.B[rows]
    beta1, beta2 = hyper.betas
    gamma1, gamma2 = hyper.gammas
    bias1, bias2 = 1 - beta1**matrix.step, 1 - beta2**matrix.step
    m, w, a = (workspace.take(label, grad.shape[0], grad.shape[1], At) for label in "mwa")
    g = grad.to(At.dtype)
    torch.abs(g, out=a)

    # Y and Yv: regression of g and |g| on the old A.
    if edge is None:
        Y = _regress(g, work.m, columns, "Y", workspace)
        Yv = _regress(a, work.v, columns, "Yv", workspace)
    else:
        Y, Yv = edge[:, 2 : 2 + work.m.rank], edge[:, 2 + work.m.rank :]

    # w = beta2 (vB vA)^2 + (1 - beta2) g^2
    torch.addmm(w, vB, vAt.T, beta=0, alpha=math.sqrt(beta2), out=w)
    w.mul_(w).addcmul_(g, g, value=1 - beta2)
    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product.
    left = torch.mul(B, beta1 / bias1, out=workspace.take("left", B.shape[0], B.shape[1], At))
    left.add_(Y, alpha=-hyper.residual)
    fresh = (1 - beta1) / bias1 + hyper.residual
    if matrix.row is not None:
        # m_hat / (sqrt(f w) + floor) = m_hat / sqrt(f) / (sqrt(w) + floor / sqrt(f)): rows of the factor are scaled,
        # not those of the product.
        shrink, floor = _calibrate(w, g, edge, matrix.row[rows], hyper, bias2, matrix.interval.shape[1])
        torch.mul(g, shrink * fresh, out=m).addmm_(left.mul_(shrink), At.T)
        _sqrt_(w).add_(floor)
    else:
        torch.addmm(g, left, At.T, beta=fresh, out=m)
        _sqrt_(w.div_(bias2)).add_(hyper.eps)
    _apply(theta, m, w, hyper)

    # Alternating refresh: A is regressed with the new B; the printed form uses the old one.
    first = matrix.peers is None and rows.start == 0
    if not hyper.stable:
        _add_product(work.m.Zt[columns], g, B, first)
        _add_product(work.v.Zt[columns], a, vB, first)
    B.lerp_(Y, gamma1)
    vB.lerp_(Yv, gamma2)
    if hyper.stable:
        _add_product(work.m.Zt[columns], g, B, first)
        _add_product(work.v.Zt[columns], a, vB, first)


def _regress(g: Tensor, moment: Moment, columns: slice, label: str, workspace: Workspace) -> Tensor:
    """``g At (A A^T + d)^-1``: n x r."""
    Y = workspace.take(label, g.shape[0], moment.rank, moment.At)
    if moment.W is not None:
        return torch.mm(g, moment.W[columns], out=Y)
    product = torch.mm(g, moment.At[columns], out=workspace.take("left", g.shape[0], moment.rank, moment.At))
    return torch.mm(product, moment.inverse, out=Y)


def _add_product(Zt: Tensor, g: Tensor, B: Tensor, first: bool) -> None:
    """``Zt += g^T B``, or ``Zt = g^T B`` if it is the first."""
    if first:
        torch.mm(g.T, B, out=Zt)
    else:
        Zt.addmm_(g.T, B)


def _calibrate(
    w: Tensor, g: Tensor, edge: Tensor | None, energy: Tensor, hyper: Hyper, bias2: float, q: int
) -> tuple[Tensor, Tensor]:
    """Update the row energies ``s``; ``1 / sqrt(f)`` and ``floor / sqrt(f)`` (n x 1) of ``sqrt(v_hat) + eps``.

    ``v_hat = f w`` with ``f = s / bias2 / mean(w)``, so that the denominator is ``sqrt(f w) + eps``; in a row where all
    of ``w`` is 0 it is ``sqrt(s / bias2) + eps``.
    """
    sum_g2 = edge[:, 0] if edge is not None else torch.linalg.vector_norm(g, dim=1).square_()
    sum_w = edge[:, 1] if edge is not None else w.sum(1)
    energy.mul_(hyper.betas[1]).add_(sum_g2, alpha=(1 - hyper.betas[1]) / q)
    level = energy / bias2
    some = sum_w > 0
    shrink = (sum_w / level.clamp_min(torch.finfo(level.dtype).tiny)).div_(q).sqrt_()
    shrink = torch.where(some, shrink, torch.ones_like(level))
    floor = torch.where(some, torch.zeros_like(level), level.sqrt()).add_(hyper.eps).mul_(shrink)
    return shrink[:, None], floor[:, None]


def _sqrt_(w: Tensor) -> Tensor:
    """Square root in place. On a CPU as ``1 / w^-0.5``, exact at 0 and infinity: two vectorised passes of torch's own,
    in half the time of its ``sqrt``, which calls a vendor's library.
    """
    return w.pow_(-0.5).reciprocal_() if w.device.type == "cpu" else w.sqrt_()


def _apply(theta: Tensor, m: Tensor, denom: Tensor, hyper: Hyper) -> None:
    wide = theta if theta.dtype == m.dtype else theta.to(m.dtype)
    if hyper.weight_decay:
        wide.mul_(1 - hyper.lr * hyper.weight_decay)
    if math.isfinite(hyper.max_update):
        m.div_(denom).clamp_(-hyper.max_update, hyper.max_update)
        wide.add_(m, alpha=-hyper.lr * hyper.scale)
    else:
        wide.addcdiv_(m, denom, value=-hyper.lr * hyper.scale)
    if wide is not theta:
        theta.copy_(wide)


def _refresh(works: list[Work], hyper: Hyper) -> None:
    """``At <- (1 - gamma) At + gamma Zt (S + d)^-1`` on this rank's columns."""
    for moments, gamma in (([w.m for w in works], hyper.gammas[0]), ([w.v for w in works], hyper.gammas[1])):
        inverses = damped_inverses([moment.S for moment in moments], hyper.damping, hyper.stable)
        for moment, inverse in zip(moments, inverses, strict=True):
            moment.factors.At.addmm_(moment.Zt, inverse, beta=1 - gamma, alpha=gamma)
