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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .comm import Comm
from .factors import Matrix
from .interval import Segment, cut_rows
from .refresh import damped_inverses


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


@dataclass(frozen=True)
class Memory:
    """How large the transient tensors of a step may be.

    Attributes:
        block: bytes of one row block's p x q temporary; three of them exist at a time.
        bucket: bytes of gathered factors and their gradients that are in flight at a time.
    """

    block: int = 1 << 20
    bucket: int = 32 << 20


@dataclass
class Item:
    """One matrix in a step: its state, and the local pieces of the parameter and gradient (1-D, same length).

    ``target`` is set if ``theta`` is a copy that the caller has to write back there.
    """

    matrix: Matrix
    theta: Tensor
    grad: Tensor
    target: Tensor | None = None


@dataclass
class _Work:
    """What the phases of one bucket pass along for one matrix."""

    item: Item
    At: Tensor
    vAt: Tensor
    cut: dict[int, int]  # row -> its line in ``edge``
    edge: Tensor  # cut rows x (sum g^2, sum w, Y, Yv)
    gram: Tensor
    gram_v: Tensor
    inverse: Tensor | None = None
    inverse_v: Tensor | None = None
    Zt: Tensor | None = None
    Zvt: Tensor | None = None
    S: Tensor | None = None
    Sv: Tensor | None = None


def step(items: list[Item], hyper: Hyper, comm: Comm, memory: Memory) -> None:
    """One step of every matrix in ``items``, in place. Collective over each matrix's peers, in the order of items."""
    scratch = Scratch(memory.block)
    for bucket in buckets(items, memory.bucket):
        _step_bucket(bucket, hyper, comm, scratch)


def buckets(items: list[Item], limit: int) -> Iterator[list[Item]]:
    """Consecutive items whose transient factors fit in ``limit`` bytes (at least one item each).

    Every group of peers sees its matrices in the same order and of the same size, so where a group spans several
    matrices (it then holds all of them) its ranks cut the list at the same places.
    """
    bucket: list[Item] = []
    used = 0
    for item in items:
        size = transient_bytes(item.matrix)
        if bucket and used + size > limit:
            yield bucket
            bucket, used = [], 0
        bucket.append(item)
        used += size
    if bucket:
        yield bucket


def transient_bytes(matrix: Matrix) -> int:
    """Bytes of gathered factors, their gradients and the packed collectives of one matrix in a step."""
    r = matrix.m.B.shape[1] + matrix.v.B.shape[1]
    q = matrix.block_size * matrix.parts
    return (2 if matrix.peers is None else 5) * q * r * matrix.m.B.element_size()


def _step_bucket(items: list[Item], hyper: Hyper, comm: Comm, scratch: Scratch) -> None:
    for item in items:
        item.matrix.step += 1
    works = _gather(items, comm)
    _exchange_edges(works, hyper, comm)
    _factor(works, hyper)
    for work in works:
        _local_pass(work, hyper, scratch)
    _reduce(works, comm)
    _refresh(works, hyper)


def _by_group(works: list[Any], matrix_of: Callable[[Any], Matrix]) -> list[tuple[Any, list[Any]]]:
    """Shared matrices by process group, groups in order of first use (the same order on every rank)."""
    found: dict[int, tuple[Any, list[Any]]] = {}
    for work in works:
        peers = matrix_of(work).peers
        if peers is not None:
            found.setdefault(id(peers.group), (peers.group, []))[1].append(work)
    return list(found.values())


# gather ---------------------------------------------------------------------------------------------------------


def _gather(items: list[Item], comm: Comm) -> list[_Work]:
    """Gather ``At`` and ``vAt`` of shared matrices; lay out the edge sums."""
    waits = []
    for group, shared in _by_group(items, lambda item: item.matrix):
        packed = torch.cat([_padded(f.At, x.matrix.block_size) for x in shared for f in (x.matrix.m, x.matrix.v)])
        waits.append((comm.all_gather(packed, group, "gather A"), shared))
    whole: dict[int, tuple[Tensor, Tensor]] = {}
    for wait, shared in waits:
        gathered, at = wait(), 0
        for item in shared:
            q, size = item.matrix.interval.shape[1], item.matrix.block_size
            pair = []
            for factors in (item.matrix.m, item.matrix.v):
                r = factors.At.shape[1]
                pair.append(gathered[:, at : at + size * r].reshape(-1, r)[:q])
                at += size * r
            whole[id(item)] = (pair[0], pair[1])
    return [_lay_out(x, *whole.get(id(x), (x.matrix.m.At, x.matrix.v.At))) for x in items]


def _padded(block: Tensor, rows: int) -> Tensor:
    """A block of ``At`` (columns x r), flat, with zero rows appended up to ``rows``."""
    return torch.nn.functional.pad(block.reshape(-1), (0, (rows - block.shape[0]) * block.shape[1]))


def _lay_out(item: Item, At: Tensor, vAt: Tensor) -> _Work:
    peers = item.matrix.peers
    cut = cut_rows(peers.ranges, item.matrix.interval.shape[1]) if peers else ()
    r, rv = At.shape[1], vAt.shape[1]
    return _Work(
        item,
        At,
        vAt,
        {row: line for line, row in enumerate(cut)},
        At.new_zeros(len(cut), 2 + r + rv),
        At.new_empty(r, r),
        At.new_empty(rv, rv),
    )


# edge -----------------------------------------------------------------------------------------------------------


def _exchange_edges(works: list[_Work], hyper: Hyper, comm: Comm) -> None:
    """Sums over rows that are cut between ranks, and the Grams of ``A``: local parts, then one all-reduce a group."""
    for work in works:
        m, v = work.item.matrix.m, work.item.matrix.v
        torch.mm(m.At.T, m.At, out=work.gram)
        torch.mm(v.At.T, v.At, out=work.gram_v)
        for segment in work.item.matrix.interval.segments():
            if segment.row in work.cut:
                _edge_sums(work, segment, hyper)
    waits = []
    for group, shared in _by_group(works, lambda work: work.item.matrix):
        parts = [t for work in shared for t in (work.edge, work.gram, work.gram_v)]
        packed = torch.cat([t.reshape(-1) for t in parts])
        waits.append((comm.all_reduce(packed, group, "edge rows and Gram of A"), parts))
    for wait, parts in waits:
        _unpack(wait(), parts)


def _edge_sums(work: _Work, segment: Segment, hyper: Hyper) -> None:
    matrix = work.item.matrix
    g = _view(work.item.grad, segment).to(work.At.dtype)
    row = segment.row - matrix.interval.first_row
    At, vAt = work.At[segment.col : segment.col_stop], work.vAt[segment.col : segment.col_stop]
    u = matrix.v.B[row : row + 1] @ vAt.T
    beta2, r = hyper.betas[1], At.shape[1]
    line = work.edge[work.cut[segment.row]]
    line[0] += g.square().sum()
    line[1] += (beta2 * u.square() + (1 - beta2) * g.square()).sum()
    line[2 : 2 + r] += (g @ At)[0]
    line[2 + r :] += (g.abs() @ vAt)[0]


def _unpack(flat: Tensor, parts: list[Tensor]) -> None:
    at = 0
    for part in parts:
        part.copy_(flat[at : at + part.numel()].view_as(part))
        at += part.numel()


def _factor(works: list[_Work], hyper: Hyper) -> None:
    """Invert the damped Grams of ``A``; the cut rows' Y is solved here."""
    inverses = damped_inverses([w.gram for w in works], hyper.damping, hyper.stable)
    inverses_v = damped_inverses([w.gram_v for w in works], hyper.damping, hyper.stable)
    for work, inverse, inverse_v in zip(works, inverses, inverses_v, strict=True):
        work.inverse, work.inverse_v = inverse, inverse_v
        if work.cut:
            r = work.At.shape[1]
            work.edge[:, 2 : 2 + r] = work.edge[:, 2 : 2 + r] @ inverse
            work.edge[:, 2 + r :] = work.edge[:, 2 + r :] @ inverse_v


# local ----------------------------------------------------------------------------------------------------------


class Scratch:
    """Flat temporaries that every block of a step reuses: three of a row block, and three of its products with A."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def rows(self, q: int, like: Tensor) -> int:
        """Rows of width q in a block."""
        return max(1, self.block_bytes // (q * like.element_size()))

    def take(self, label: str, rows: int, cols: int, like: Tensor) -> Tensor:
        """An uninitialised rows x cols tensor of ``like``'s dtype and device."""
        key = (label, like.dtype, like.device)
        have = self.buffers.get(key)
        if have is None or have.numel() < rows * cols:
            have = self.buffers[key] = like.new_empty(rows * cols)
        return have[: rows * cols].view(rows, cols)


def _view(flat: Tensor, segment: Segment) -> Tensor:
    return flat[segment.offset : segment.offset + segment.numel].view(segment.rows, -1)


def _local_pass(work: _Work, hyper: Hyper, scratch: Scratch) -> None:
    """Update theta and ``B`` row block by row block while the gradient block is hot; sum up Z and S."""
    matrix = work.item.matrix
    q = matrix.block_size * matrix.parts
    work.Zt = work.At.new_zeros(q, work.At.shape[1])
    work.Zvt = work.At.new_zeros(q, work.vAt.shape[1])
    if not hyper.stable:
        _row_grams(work)
    for segment in matrix.interval.segments():
        theta, grad = _view(work.item.theta, segment), _view(work.item.grad, segment)
        edge = work.edge[work.cut[segment.row]][None] if segment.row in work.cut else None
        size = scratch.rows(segment.col_stop - segment.col, work.At)
        for low in range(0, segment.rows, size):
            high = min(segment.rows, low + size)
            at = segment.row - matrix.interval.first_row
            columns = slice(segment.col, segment.col_stop)
            _update_block(
                work, theta[low:high], grad[low:high], slice(at + low, at + high), columns, edge, hyper, scratch
            )
    if hyper.stable:
        _row_grams(work)


def _row_grams(work: _Work) -> None:
    """``S = B^T B`` over the rows that are counted here."""
    matrix = work.item.matrix
    owned = slice(matrix.interval.first_owned, None)
    work.S = matrix.m.B[owned].T @ matrix.m.B[owned]
    work.Sv = matrix.v.B[owned].T @ matrix.v.B[owned]


def _update_block(
    work: _Work,
    theta: Tensor,
    grad: Tensor,
    rows: slice,
    columns: slice,
    edge: Tensor | None,
    hyper: Hyper,
    scratch: Scratch,
) -> None:
    """One block: theta and grad n x c, ``rows`` of B, ``columns`` of A; ``edge`` (1 x ...) if the row is cut."""
    matrix = work.item.matrix
    At, vAt, B, vB = work.At[columns], work.vAt[columns], matrix.m.B[rows], matrix.v.B[rows]
    beta1, beta2 = hyper.betas
    gamma1, gamma2 = hyper.gammas
    r = At.shape[1]
    bias1, bias2 = 1 - beta1**matrix.step, 1 - beta2**matrix.step
    m, w, a = (scratch.take(label, *grad.shape, like=At) for label in "mwa")
    g = grad.to(At.dtype)
    torch.abs(g, out=a)

    # Y and Yv: regression of g and |g| on the old A.
    if edge is None:
        Y = _regress(g, At, work.inverse, "Y", scratch)
        Yv = _regress(a, vAt, work.inverse_v, "Yv", scratch)
    else:
        Y, Yv = edge[:, 2 : 2 + r], edge[:, 2 + r :]

    # m_hat = (beta1 B A + (1 - beta1) g) / bias1 + residual (g - Y A), as one product.
    left = torch.mul(B, beta1 / bias1, out=scratch.take("left", *B.shape, like=At))
    torch.mm(left.add_(Y, alpha=-hyper.residual), At.T, out=m)
    m.add_(g, alpha=(1 - beta1) / bias1 + hyper.residual)
    # w = beta2 (vB vA)^2 + (1 - beta2) g^2
    torch.mm(torch.mul(vB, math.sqrt(beta2)), vAt.T, out=w)
    w.mul_(w).addcmul_(g, g, value=1 - beta2)
    if hyper.stable:
        _calibrate(w, g, edge, matrix.row[rows], hyper, bias2, matrix.interval.shape[1])
    else:
        w.div_(bias2).sqrt_().add_(hyper.eps)
    _apply(theta, m, w, hyper)

    # Alternating refresh: A is regressed with the new B; the printed form uses the old one.
    if hyper.stable:
        B.lerp_(Y, gamma1)
        vB.lerp_(Yv, gamma2)
    work.Zt[columns].addmm_(g.T, B)
    work.Zvt[columns].addmm_(a.T, vB)
    if not hyper.stable:
        B.lerp_(Y, gamma1)
        vB.lerp_(Yv, gamma2)


def _regress(g: Tensor, At: Tensor, inverse: Tensor, label: str, scratch: Scratch) -> Tensor:
    """``g At (A A^T + d)^-1``: n x r."""
    shape = g.shape[0], At.shape[1]
    product = torch.mm(g, At, out=scratch.take("left", *shape, like=At))
    return torch.mm(product, inverse, out=scratch.take(label, *shape, like=At))


def _calibrate(w: Tensor, g: Tensor, edge: Tensor | None, energy: Tensor, hyper: Hyper, bias2: float, q: int) -> None:
    """``w <- sqrt(v_hat) + eps`` with the row energies ``s`` (updated): ``v_hat = s / bias2 * w / mean(w)``."""
    sum_g2 = edge[:, 0] if edge is not None else torch.linalg.vector_norm(g, dim=1).square_()
    sum_w = edge[:, 1] if edge is not None else w.sum(1)
    energy.mul_(hyper.betas[1]).add_(sum_g2, alpha=(1 - hyper.betas[1]) / q)
    level = energy / bias2
    some = sum_w > 0
    factor = torch.where(some, level * q / sum_w, torch.zeros_like(level))
    floor = torch.where(some, torch.zeros_like(level), level.sqrt()).add_(hyper.eps)
    w.mul_(factor[:, None]).sqrt_().add_(floor[:, None])


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


# reduce and refresh ---------------------------------------------------------------------------------------------


def _reduce(works: list[_Work], comm: Comm) -> None:
    """Sum Z into each rank's block of columns, and S everywhere."""
    waits = []
    for group, shared in _by_group(works, lambda work: work.item.matrix):
        parts = shared[0].item.matrix.parts
        blocks = torch.cat([t.view(parts, -1) for work in shared for t in (work.Zt, work.Zvt)], dim=1)
        grams = [t for work in shared for t in (work.S, work.Sv)]
        packed = torch.cat([t.reshape(-1) for t in grams])
        scatter = comm.reduce_scatter(blocks, group, "reduce Z")
        waits.append((scatter, comm.all_reduce(packed, group, "Gram of B"), shared, grams))
    for scatter, gram_wait, shared, grams in waits:
        mine, at = scatter(), 0
        for work in shared:
            size, r, rv = work.item.matrix.block_size, work.At.shape[1], work.vAt.shape[1]
            columns = work.item.matrix.m.At.shape[0]
            work.Zt = mine[at : at + size * r].view(size, r)[:columns]
            at += size * r
            work.Zvt = mine[at : at + size * rv].view(size, rv)[:columns]
            at += size * rv
        _unpack(gram_wait(), grams)


def _refresh(works: list[_Work], hyper: Hyper) -> None:
    """``At <- (1 - gamma) At + gamma Zt (S + d)^-1`` on this rank's columns."""
    gamma1, gamma2 = hyper.gammas
    inverses = damped_inverses([w.S for w in works], hyper.damping, hyper.stable)
    inverses_v = damped_inverses([w.Sv for w in works], hyper.damping, hyper.stable)
    for work, inverse, inverse_v in zip(works, inverses, inverses_v, strict=True):
        work.item.matrix.m.At.lerp_(work.Zt @ inverse, gamma1)
        work.item.matrix.v.At.lerp_(work.Zvt @ inverse_v, gamma2)
