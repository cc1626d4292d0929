"""Command lines whose errors are one line, and sizes as they print them."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from . import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises a ConfigError, on every rank, instead of printing its usage; names the nearest option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which takes ``--option=--`` for a list without elements."""
        given = list(sys.argv[1:] if args is None else args)
        bad = next((word for word in given if word.startswith("--") and word.endswith("=--")), None)
        if bad is not None:
            self.error(f"argument {bad.removesuffix('=--')}: expected one argument")
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, which would complain of a missing option where it is given with a typing error."""
        for word in sys.argv[1:] if args is None else args:
            if word == "--":
                break
            option = word.split("=")[0]
            if re.fullmatch(r"--[A-Za-z]\w*", option) and option not in self._option_string_actions:
                self.error(f"unrecognized arguments: {option}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError about a bad command line."""
        marker = "unrecognized arguments: "
        if marker in message:
            wanted = (message.split(marker, 1)[1].split() or ["''"])[0].split("=")[0]
            near = difflib.get_close_matches(wanted, [o for a in self._actions for o in a.option_strings], n=1)
            raise ConfigError(f"unknown option {wanted}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        raise ConfigError(f"{message} (see {self.prog} --help)")


@contextmanager
def naming_paths() -> Iterator[None]:
    """A path that the system refuses (too long, in a folder that may not be entered) is bad input as well.

    Raises:
        ConfigError: for an OSError that names a file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(f"{error.filename}: {error.strerror}") from error


def readable(count: int) -> str:
    """Bytes in a unit that suits them."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
