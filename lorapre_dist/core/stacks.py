"""Small matrices of equal shape as one: each operation of a step is done once for all of them, in batched products.

Experts are many and small, and an operation on a small tensor costs its launch. So those that this rank holds whole are
brought together in a stack, which goes through the step like one matrix: its tensors have a dimension more, in front,
and its pieces are k x n. Larger matrices have products that are long enough by themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .exchange import Item
from .factors import Factors, Matrix
from .sizes import runs


def of(matrices: Sequence[Matrix], limit: int, others: Sequence[Hashable] = ()) -> list[list[int]]:
    """The stacks of matrices that are alike, also in what ``others`` says of each; those that are shared stay alone."""
    alike = [None if m.peers else (m.interval.shape, *m.ranks.items(), m.dtype) for m in matrices]
    kinds = [one and (one, other) for one, other in zip(alike, others, strict=True)] if others else alike
    return runs(kinds, [_bytes(m) for m in matrices], limit)


def kind(item: Item) -> Hashable:
    """What the matrices of a stack have in common in a step: statistics, and types of tensors."""
    matrix, tensors = item.matrix, (item.theta, item.grad)
    return matrix.variant, *matrix.vectors, *((t.dtype, t.device) for t in tensors)


def copied_bytes(matrices: list[Matrix]) -> int:
    """Bytes that a stack of these matrices copies, at most."""
    tensors = [tensor for matrix in matrices for tensor in matrix.tensors().values()]
    return sum(t.numel() * t.element_size() for t in tensors) + 2 * sum(map(_bytes, matrices))


@contextmanager
def stacked(run: list[Item]) -> Iterator[Item]:
    """One item for all of ``run``; what is done to it in place has been done to each of them at the end.

    The matrices' state is brought together once: from then on it lies in the stack, and theirs are views.
    """
    matrices = [item.matrix for item in run]
    factors = {
        moment: Factors(*(_lying_together([m.factors[moment] for m in matrices], side) for side in ("B", "A")))
        for moment in matrices[0].factors
    }
    vectors = {name: _lying_together([m.vectors for m in matrices], name) for name in matrices[0].vectors}
    matrix = replace(matrices[0], factors=factors, vectors=vectors, taken=_lying_together(matrices, "taken"))
    theta, grad = (_joined([getattr(item, of) for item in run]) for of in ("theta", "grad"))
    yield Item(matrix, theta, grad, torch.stack([item.largest for item in run]), run[0].go)
    if theta.data_ptr() != run[0].theta.data_ptr():
        torch._foreach_copy_([item.theta for item in run], list(theta.unbind()))


def _bytes(matrix: Matrix) -> int:
    p, q = matrix.interval.shape
    return p * q * matrix.dtype.itemsize


def _lying_together(owners: list[Any], name: str) -> Tensor:
    """The stack of the tensors that ``owners`` (objects or dicts) have by a name; they become views of it."""
    get, put = (dict.__getitem__, dict.__setitem__) if isinstance(owners[0], dict) else (getattr, setattr)
    pieces = [get(owner, name) for owner in owners]
    stack = _joined(pieces)
    if stack.data_ptr() != pieces[0].data_ptr():
        for owner, piece in zip(owners, stack.unbind(), strict=True):
            put(owner, name, piece)
    return stack


def _joined(pieces: list[Tensor]) -> Tensor:
    """Tensors of one shape in one, of a dimension more: a view where they lie behind each other, as experts do."""
    first, size = pieces[0], pieces[0].numel()
    start, itemsize = first.data_ptr(), first.element_size()
    storage = first.untyped_storage().data_ptr()
    if all(
        t.data_ptr() == start + k * size * itemsize and t.is_contiguous() and t.untyped_storage().data_ptr() == storage
        for k, t in enumerate(pieces)
    ):
        return first.as_strided((len(pieces), *first.shape), (size, *first.stride()))
    return torch.stack(pieces)
