"""Command lines whose errors are one line, and sizes as they print them."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from .config import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises a ConfigError, on every rank, instead of printing its usage; names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError about a bad command line."""
        marker = "unrecognized arguments: "
        if marker in message:
            wanted = message.split(marker, 1)[1].split()[0].split("=")[0]
            near = difflib.get_close_matches(wanted, [o for a in self._actions for o in a.option_strings], n=1)
            raise ConfigError(f"unknown option {wanted}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        raise ConfigError(f"{message} (see {self.prog} --help)")


def readable(count: int) -> str:
    """Bytes in a unit that suits them."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
