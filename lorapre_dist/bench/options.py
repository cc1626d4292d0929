"""The command line of every bench."""

from __future__ import annotations

import argparse

from lorapre_dist.config.arguments import Parser


def bench_parser(name: str, description: str | None) -> Parser:
    """A parser for the bench ``name``; its ``description`` is shown as written, commands in lines of their own."""
    return Parser(
        prog=f"lorapre_dist.bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
