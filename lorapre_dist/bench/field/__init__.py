"""Every optimizer on the same tokens from the same weights, each at its best learning rate: see :mod:`.command`."""

from __future__ import annotations


def main(argv: list[str]) -> None:
    """The command ``bench field``."""
    from .command import main as run

    run(argv)
