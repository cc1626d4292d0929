"""Matrices that are alike as one: each operation of a step is done once for all of them, in batched products.

Which go together is decided in ``batching.py``. A stack goes through the step like one matrix: its tensors have a
dimension more, in front, and its pieces are k x n. A matrix alone is a stack of one, and a view.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import rounding
from .exchange import Item
from .factors import Ahead, Factors
from .guard import Size
from .rounding import Rounding


def kind(item: Item) -> Hashable:
    """What the matrices of a stack have in common in a step beside their outline: types of tensors, and rounding."""
    return (type(item.matrix.rounding), *((t.dtype, t.device) for t in (item.theta, item.grad)))


def stacked(run: list[Item]) -> Item:
    """One item for all of ``run``, which has been done to each of them once :func:`unstack` has been called.

    The matrices' state is brought together once: from then on it lies in the stack, and theirs are views.
    """
    matrices = [item.matrix for item in run]
    factors = {moment: _factors([m.factors[moment] for m in matrices]) for moment in matrices[0].factors}
    vectors = {name: _lying_together([m.vectors for m in matrices], name) for name in matrices[0].vectors}
    codes = {name: _lying_together([m.codes for m in matrices], name) for name in matrices[0].codes}
    matrix = replace(
        matrices[0],
        factors=factors,
        vectors=vectors,
        codes=codes,
        taken=_lying_together(matrices, "taken"),
        salt=None if matrices[0].salt is None else _lying_together(matrices, "salt"),
        rounding=_rounding([m.rounding for m in matrices]),
    )
    looks = [item.look for item in run if item.look is not None]
    look = torch.cat(looks) if len(looks) == len(run) else None
    sizes = [item.size for item in run if item.size is not None]
    size = Size.of_all(sizes) if len(sizes) == len(run) else None
    # What is said of the gradient is asked for where the size has still to be found.
    largest = run[0].largest[None] if size is not None else _joined([item.largest for item in run])
    return Item(matrix, *elements(run), largest, run[0].go, look, size)


def elements(run: list[Item]) -> tuple[Tensor, Tensor]:
    """Weights and gradients of a stack."""
    theta, grad = (_joined([getattr(item, of) for item in run]) for of in ("theta", "grad"))
    return theta, grad


def unstack(stack: Item, run: list[Item]) -> None:
    """Copy the stack's weights to where they came from, unless they lie there."""
    if not _shares(stack.theta, run[0].theta):
        torch._foreach_copy_([item.theta for item in run], list(stack.theta.unbind()))


def _rounding(each: list[Rounding]) -> Rounding:
    """How the weights of a stack are kept, from how each matrix's are."""
    first = each[0]
    if isinstance(first, rounding.Stochastic):
        return rounding.stacked(each)
    return rounding.Kahan(_lying_together(each, "low")) if isinstance(first, rounding.Kahan) else first


def _factors(some: list[Factors]) -> Factors:
    """A stack's factors, with what was worked out ahead if that was for all of them; it counts for one step."""
    ahead = [one.ahead for one in some if one.ahead is not None]
    for one in some:
        one.ahead = None
    B, A = (_lying_together(some, side) for side in ("B", "A"))
    return Factors(B, A, _joined_ahead(ahead) if len(ahead) == len(some) else None)


def _joined_ahead(some: list[Ahead]) -> Ahead:
    A, inverse = ([one for one in of if one is not None] for of in ([a.A for a in some], [a.inverse for a in some]))
    alike = len(inverse) == len(some) and all(one.of == some[0].of for one in some)
    return Ahead(
        _joined(A) if len(A) == len(some) else None,
        _joined(inverse) if alike else None,
        some[0].of if alike else None,
    )


def _lying_together(owners: list[Any], name: str) -> Tensor:
    """The stack of the tensors that ``owners`` (objects or dicts) have by a name; they become views of it."""
    get, put = (dict.__getitem__, dict.__setitem__) if isinstance(owners[0], dict) else (getattr, setattr)
    pieces = [get(owner, name) for owner in owners]
    stack = _joined(pieces)
    if not _shares(stack, pieces[0]):
        for owner, piece in zip(owners, stack.unbind(), strict=True):
            put(owner, name, piece)
    return stack


def _joined(pieces: list[Tensor]) -> Tensor:
    """Tensors of one shape in one, of a dimension more: a view where they lie behind each other, as experts do."""
    first, size = pieces[0], pieces[0].numel()
    if len(pieces) == 1:
        return first[None]
    start = first.storage_offset()
    if all(
        t.storage_offset() == start + k * size and t.is_contiguous() and _shares(t, first) for k, t in enumerate(pieces)
    ):
        return first.as_strided((len(pieces), *first.shape), (size, *first.stride()))
    return torch.stack(pieces)


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage; fake tensors have no pointers to compare."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
