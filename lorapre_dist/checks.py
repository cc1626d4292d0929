"""Checks of single settings: a bad value raises a :class:`ConfigError` that names it and what is allowed."""

from __future__ import annotations

import math
import re
import sys
from typing import Any


class ConfigError(ValueError):
    """Bad user input. The message is one line that names the value, what is allowed and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # a value may have lines of its own


def check_expression(entry: str) -> None:
    """Raise a ConfigError if an entry of ``target_modules`` is not a regular expression (a name always is one)."""
    try:
        re.compile(entry)
    except re.error as error:
        raise ConfigError(f"target_modules={entry!r}: not a valid regular expression ({error})") from None


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise a ConfigError unless ``value`` is a finite number within the bounds."""
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or high == math.inf else ']'}"
    # Written so that NaN, infinity and an integer beyond any float fail it.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    ok = ok and (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if not ok:
        raise ConfigError(f"{name}={value!r}: must be a number in {allowed}")


def integer(name: str, value: Any, *, low: int) -> None:
    """Raise a ConfigError unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r}: must be an integer of at least {low}")


def boolean(name: str, value: Any, optional: bool = False) -> None:
    """Raise a ConfigError unless ``value`` is a bool (``optional``: or None)."""
    if not isinstance(value, bool) and not (optional and value is None):
        raise ConfigError(f"{name}={value!r}: must be true or false")


def several(name: str, value: Any, count: int) -> None:
    """Raise a ConfigError unless ``value`` is a tuple of ``count``."""
    if not isinstance(value, tuple) or len(value) != count:
        raise ConfigError(f"{name}={value!r}: must be {'two' if count == 2 else 'three'} numbers")


def pair(name: str, value: Any, **bounds: Any) -> None:
    """Raise a ConfigError unless ``value`` is two numbers within the bounds of :func:`number`."""
    several(name, value, 2)
    for one in value:
        number(name, one, **bounds)
