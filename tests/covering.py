"""Fewer cases than the full product of parameters, none of which is the only one of its kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], chosen: Iterable[Any]) -> list[Any]:
    """The ``values`` for ``parametrize``, of which the ``chosen`` run by default and all with ``--exhaustive``.

    A tuple is the values of several parameters.
    """
    by_default, found = list(chosen), []
    for value in values:
        marks = () if value in by_default else pytest.mark.exhaustive
        found.append(pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks))
    return found


def covering(*values: Iterable[Any], strength: int = 2) -> list[Any]:
    """The product of ``values`` for ``parametrize``, of which some run by default and all with ``--exhaustive``.

    By default every combination of values of any ``strength`` axes occurs in some case; 1: every value does.
    """
    axes = [list(axis) for axis in values]
    product = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def covered(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), strength))

    missing, chosen = set().union(*map(covered, product)), set()
    while missing:
        best = max(product, key=lambda case: len(covered(case) & missing))
        chosen.add(best)
        missing -= covered(best)
    cases = [(case, tuple(axis[k] for axis, k in zip(axes, case, strict=True))) for case in product]
    return [pytest.param(*found, marks=() if case in chosen else pytest.mark.exhaustive) for case, found in cases]
