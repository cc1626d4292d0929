"""Triton kernels of what a row block's rows need before theta is updated: one reading of the gradient, and all that is
done to rows of factors; see :mod:`lorapre_dist.core.rules.adam` for what that is, operation by operation.

They are two launches where the operations are 50, most of them on a few numbers a row: on a GPU it is launches that a
step's small parts cost. They have been compared with these operations under Triton's interpreter and on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..guard import Go, Size
from ..workspace import Workspace

#: Columns that are read at a time, and columns of the Gram.
WIDTH, SLICE = 1024, 16


@triton.jit
def read_rows(  # type: ignore[no-untyped-def]
    grad, g, a, norm, inverse, largest, n, c, grad_stack, grad_row,
    SCALED: tl.constexpr, CLEANED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of the gradient: without what counts as 0, its absolute values, and the norm of its scaled numbers."""
    k, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    place, out = grad + k * grad_stack + row * grad_row, (k * n + row) * c
    size = 1.0
    if SCALED:
        size = tl.load(inverse + k)
    squares = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, c, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        x = tl.load(place + columns, mask=columns < c, other=0.0).to(tl.float32)
        if CLEANED:
            x = tl.where(tl.abs(x) <= tl.load(largest + k), x, 0.0)
        tl.store(g + out + columns, x, mask=columns < c)
        tl.store(a + out + columns, tl.abs(x), mask=columns < c)
        x = x * size
        squares += x * x
    tl.store(norm + k * n + row, tl.sqrt_rn(tl.sum(squares)))


@triton.jit
def step_row(  # type: ignore[no-untyped-def]
    B, vB, Y, Yv, gram, norm, sums, rms, inverse, taken, go,
    left, low, gain, floor, scaled, scaled_v, n, r, s,
    B_stack, vB_stack, Y_stack, Y_row, Yv_stack, Yv_row, sums_stack, sums_row, rms_stack,
    beta1, beta2, log1, log2, gamma, gamma_v, residual, eps, q,
    SCALED: tl.constexpr, SUMMED: tl.constexpr, TINY: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """All that is done to a row of the factors, and what theta's row is updated with."""
    k, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    here = k * n + row
    step = tl.load(go).to(tl.float32)
    number = tl.maximum(tl.load(taken + k), 1.0)  # fp64
    bias1 = (1.0 - tl.exp(number * log1)).to(tl.float32)
    bias2 = (1.0 - tl.exp(number * log2)).to(tl.float32)
    size = 1.0
    if SCALED:
        size = tl.load(inverse + k)

    i = tl.arange(0, S)
    place = vB + k * vB_stack + row * s
    v_row = tl.load(place + i, mask=i < s, other=0.0)
    low_row = v_row * size * tl.sqrt_rn(beta2)
    tl.store(low + here * s + i, low_row, mask=i < s)
    if SUMMED:  # over the ranks that the row is cut between
        squares = tl.load(sums + k * sums_stack + row * sums_row)
        sum_w = tl.load(sums + k * sums_stack + row * sums_row + 1)
        length = tl.sqrt_rn(squares)
    else:
        length = tl.load(norm + here)
        sum_w = (1.0 - beta2) * length * length
        for start in range(0, s, SLICE):
            j = start + tl.arange(0, SLICE)
            part = tl.load(
                gram + k * s * s + i[:, None] * s + j[None, :], mask=(i[:, None] < s) & (j[None, :] < s), other=0.0
            )
            some = tl.load(place + j, mask=j < s, other=0.0) * size * tl.sqrt_rn(beta2)
            sum_w += tl.sum(tl.sum(low_row[:, None] * part, axis=0) * some)

    # The root mean square of the row, without a square that is no number.
    old = tl.load(rms + k * rms_stack + row) * (step * (tl.sqrt_rn(beta2) - 1.0) + 1.0)
    fresh = length / size * (step * tl.sqrt_rn((1.0 - beta2) / q))
    most = tl.maximum(tl.maximum(old, fresh), TINY)
    new = most * tl.sqrt_rn((old / most) * (old / most) + (fresh / most) * (fresh / most))
    new = tl.where(fresh > 0.0, new, old)  # no bit of it changes without a step
    tl.store(rms + k * rms_stack + row, new)
    shrink = tl.sqrt_rn(sum_w / q + TINY) / tl.maximum(new / tl.sqrt_rn(bias2), TINY)
    tl.store(gain + here, shrink * ((1.0 - beta1) / bias1 + residual))
    tl.store(floor + here, shrink * eps)

    i = tl.arange(0, R)
    place = B + k * B_stack + row * r
    b_row = tl.load(place + i, mask=i < r, other=0.0)
    y_row = tl.load(Y + k * Y_stack + row * Y_row + i, mask=i < r, other=0.0)
    tl.store(left + here * r + i, b_row * (shrink * (step * beta1 / bias1)) - residual * (y_row * shrink), mask=i < r)
    b_row += (step * gamma) * (y_row - b_row)
    tl.store(place + i, b_row, mask=i < r)
    tl.store(scaled + here * r + i, b_row * size, mask=i < r)

    i = tl.arange(0, S)
    y_row = tl.load(Yv + k * Yv_stack + row * Yv_row + i, mask=i < s, other=0.0)
    v_row += (step * gamma_v) * (y_row - v_row)
    tl.store(vB + k * vB_stack + row * s + i, v_row, mask=i < s)
    tl.store(scaled_v + here * s + i, v_row * size, mask=i < s)


def read(grad: Tensor, size: Size, like: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block's gradient (k x n x c): it without what counts as 0, ``|g|``, and each row's norm (k x n), scaled."""
    k, n, c = grad.shape
    g, a = (workspace.take(label, grad.shape, like) for label in "ga")
    norm = workspace.take("norm", (k, n), like)
    if grad.numel():
        read_rows[(n, k)](
            grad, g, a, norm,
            norm if size.inverse is None else size.inverse,  # in the place of what is not read
            norm if size.largest is None else size.largest,
            n, c, *grad.stride()[:2],
            SCALED=size.inverse is not None, CLEANED=size.largest is not None, WIDTH=WIDTH,
        )  # fmt: skip
    return g, a, norm


@dataclass(frozen=True)
class Rows:
    """Rows of a block, of k matrices; those that are stepped lie as their factors do, each row in one piece.

    Attributes:
        B, vB: k x n x r and k x n x s, which follow ``Y`` and ``Yv``.
        rms: k x n, root mean squares of the gradient's rows.
        gram: ``vA vA^T`` (k x s x s), where rows are whole.
        norm: of the scaled gradient's rows (k x n), where rows are whole.
        sums: of squares and of ``w`` (k x n x 2 and more), where rows are cut between ranks.
        taken: updates of each matrix so far, this one with them (k).
        columns: of the whole matrix.
    """

    B: Tensor
    vB: Tensor
    Y: Tensor
    Yv: Tensor
    rms: Tensor
    gram: Tensor | None
    norm: Tensor
    sums: Tensor | None
    taken: Tensor
    size: Size
    go: Go
    columns: int


@dataclass(frozen=True)
class Stepped:
    """What theta is updated with (:class:`.update.Update`), and the new factors' rows as Z needs them."""

    left: Tensor
    low: Tensor
    gain: Tensor
    floor: Tensor
    scaled: Tensor
    scaled_v: Tensor


def step(
    rows: Rows,
    betas: tuple[float, float],
    gammas: tuple[float, ...],
    residual: float,
    eps: float,
    workspace: Workspace,
) -> Stepped:
    """Step the rows, in place."""
    B, vB, size = rows.B, rows.vB, rows.size
    (k, n, r), s = B.shape, vB.shape[-1]
    shapes = {"left": B, "low": vB, "scaled": B, "scaled v": vB}
    left, low, scaled, scaled_v = (workspace.take(label, x.shape, x) for label, x in shapes.items())
    gain, floor = (workspace.take(label, (k, n, 1), B) for label in ("gain", "floor"))
    norm = rows.norm  # also in the place of what is not read
    gram, sums = (norm if x is None else x for x in (rows.gram, rows.sums))
    strides = [B.stride(0), vB.stride(0), *rows.Y.stride()[:2], *rows.Yv.stride()[:2], *sums.stride()[:2]]
    if n:
        step_row[(n, k)](
            B, vB, rows.Y, rows.Yv, gram, norm, sums, rows.rms,
            norm if size.inverse is None else size.inverse, rows.taken, rows.go.value,
            left, low, gain, floor, scaled, scaled_v, n, r, s, *strides, rows.rms.stride(0),
            *betas, *(math.log(beta) if beta else -math.inf for beta in betas), *gammas,
            residual, eps, float(rows.columns),
            SCALED=size.inverse is not None, SUMMED=rows.sums is not None, TINY=torch.finfo(torch.float32).tiny,
            R=triton.next_power_of_2(r), S=triton.next_power_of_2(s), SLICE=SLICE,
        )  # fmt: skip
    return Stepped(left, low, gain, floor, scaled, scaled_v)
