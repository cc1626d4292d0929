"""How buffers and matrices are dealt out to ranks: integers and names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ...core.interval import Range

#: From where to where along each dimension of a tensor.
Box = tuple[Range, ...]


@functools.lru_cache(maxsize=64)  # the same few sizes come again and again, and there may be thousands of ranks
def equal_ranges(numel: int, parts: int, inner: int = 1) -> tuple[Range, ...]:
    """``numel`` slices of ``inner`` elements cut into ``parts`` pieces of ``ceil(numel / parts)``, the last ones short.

    As ZeRO-3 cuts parameters, ``torch.chunk`` rows, and FSDP1 its flat ones.
    """
    size = -(-numel // parts)
    return tuple((min(numel, k * size) * inner, min(numel, (k + 1) * size) * inner) for k in range(parts))


def overlap(start: int, stop: int, low: int, high: int) -> Range:
    """The part of ``[start, stop)`` inside ``[low, high)``, empty as ``(x, x)``, measured from ``start``."""
    first, last = max(start, low), min(stop, high)
    return (first - start, last - start) if first < last else (0, 0)


def holders(start: int, stop: int, size: int) -> dict[int, Range]:
    """Who holds ``[start, stop)`` of a buffer of which rank k has ``[k size, (k + 1) size)``: each one's part of it.

    Parts are measured from ``start``; ranks that hold nothing are left out.
    """
    ranks = range(start // size, -(-stop // size)) if start < stop else range(0)
    return {k: overlap(start, stop, k * size, (k + 1) * size) for k in ranks}


def owners(elements: Mapping[str, int], size: int) -> dict[str, int]:
    """The rank that steps each matrix, from their numbers of elements: largest first, each to the least loaded rank."""
    owner, load = {}, [0] * size
    for name, numel in sorted(elements.items(), key=lambda pair: -pair[1]):
        owner[name] = load.index(min(load))
        load[owner[name]] += numel
    return owner


def expert_name(name: str, e: int) -> str:
    """Matrix ``e`` of a stack."""
    return f"{name}[{e}]"


def cut_into(start: int, stop: int, inner: int) -> Iterator[tuple[int, Range]]:
    """``[start, stop)`` by runs of ``inner`` elements: index of each run, and what of it is inside."""
    for e in range(start // inner, -(-stop // inner) if start < stop else 0):
        yield e, (max(start - e * inner, 0), min(stop - e * inner, inner))


def stack_parts(inner: int, ranks: Iterable[int], ranges: Iterable[Range]) -> dict[int, dict[int, Range]]:
    """Of each matrix (of ``inner`` elements) of a stack that lies so on ``ranks``: who holds a part, and which."""
    found: dict[int, dict[int, Range]] = {}
    for rank, (start, stop) in zip(ranks, ranges, strict=True):
        for e, part in cut_into(start, stop, inner):
            found.setdefault(e, {})[rank] = part
    return dict(sorted(found.items()))


def are_grid(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether boxes, empty ones apart, cut each dimension of a tensor into intervals that tile it."""
    full = [box for box in boxes if all(low < high for low, high in box)]
    for dim, size in enumerate(shape):
        at = 0
        for low, high in sorted({box[dim] for box in full}):
            if low != at:
                return False
            at = high
        if full and at != size:
            return False
    return True


def matrix_parts(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[tuple[Range, ...], tuple[Range, ...] | None]:
    """What boxes hold of a p x q matrix: whole rows, as elements, and of these the columns (None: all of them)."""
    _, q = shape
    rows = tuple((low * q, high * q) for (low, high), _ in boxes)
    columns = tuple(columns for _, columns in boxes)
    return rows, None if set(columns) == {(0, q)} else columns


def stack_boxes(boxes: Sequence[Box], e: int) -> dict[int, Box]:
    """Of matrix ``e`` of a stack (matrices x p x q) that lies so: which boxes hold a part of it, and which part."""
    held = {k: box for k, box in enumerate(boxes) if box[0][0] <= e < box[0][1]}
    return {k: box[1:] for k, box in held.items() if all(low < high for low, high in box[1:])}
