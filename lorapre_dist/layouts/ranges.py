"""How buffers and matrices are dealt out to ranks; integers and names alone, for a plan as for a run."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.interval import Range


def equal_ranges(numel: int, parts: int) -> tuple[Range, ...]:
    """``[0, numel)`` cut into ``parts`` pieces of ``ceil(numel / parts)``, the last ones cut short, as ZeRO-3 does."""
    size = -(-numel // parts)
    return tuple((min(numel, k * size), min(numel, (k + 1) * size)) for k in range(parts))


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
