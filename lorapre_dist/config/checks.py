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


#: Characters of a value that a message shows.
SHOWN = 200
#: Numbers outside are none in fp32, or their products are not.
SMALLEST, LARGEST = 1e-37, 1e18


def shown(value: Any) -> str:
    """A value in a message: its ``repr`` in one line, the beginning of it where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of 5,000 digits, or an object of somebody else
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def check_expression(entry: str) -> None:
    """Raise a ConfigError if an entry of ``target_modules`` is not a regular expression (a name always is one)."""
    try:
        re.compile(entry)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"target_modules={shown(entry)}: not a valid regular expression ({error})") from None


def number(
    name: str,
    value: Any,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise a ConfigError unless ``value`` is a finite number within the bounds, with which fp32 can reckon."""
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or high == math.inf else ']'}"
    # Written so that NaN, infinity and an integer beyond any float fail it.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    ok = ok and (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if not ok:
        raise ConfigError(f"{name}={shown(value)}: must be a number in {allowed}")
    if abs(value) > LARGEST:
        raise ConfigError(f"{name}={shown(value)}: must be at most {LARGEST:g}")
    if low_open and value - low < SMALLEST:  # where 0 is fine, what fp32 takes for 0 is fine, too
        raise ConfigError(f"{name}={shown(value)}: must be at least {low + SMALLEST:g}")


def integer(name: str, value: Any, *, low: int) -> None:
    """Raise a ConfigError unless ``value`` is an integer of at least ``low``, of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={shown(value)}: must be an integer of at least {low}")
    if value >= 2**64:
        raise ConfigError(f"{name}={shown(value)}: must be below 2**64")


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Raise a ConfigError unless ``value`` is one of those allowed."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ConfigError(f"{name}={shown(value)}: must be one of {', '.join(map(repr, allowed))}")


def boolean(name: str, value: Any, optional: bool = False) -> None:
    """Raise a ConfigError unless ``value`` is a bool (``optional``: or None)."""
    if not isinstance(value, bool) and not (optional and value is None):
        raise ConfigError(f"{name}={shown(value)}: must be true or false")


def several(name: str, value: Any, count: int) -> None:
    """Raise a ConfigError unless ``value`` is a tuple of ``count``."""
    if not isinstance(value, tuple) or len(value) != count:
        raise ConfigError(f"{name}={shown(value)}: must be {'two' if count == 2 else 'three'} numbers")


def pair(name: str, value: Any, **bounds: Any) -> None:
    """Raise a ConfigError unless ``value`` is two numbers within the bounds of :func:`number`."""
    several(name, value, 2)
    for one in value:
        number(name, one, **bounds)
