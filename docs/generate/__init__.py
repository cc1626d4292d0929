"""What the pages include, made from the sources when the site is built: see :func:`make_all`."""

from __future__ import annotations

import runpy
from pathlib import Path

from . import command_line, results, walk

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def make_all(out: Path) -> None:
    """Write option lists, tables of results, the walk of a gradient and figures under ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    command_line.write(out / "command_line")
    results.write(out / "results")
    walk.write(out / "walk.md")
    draw_all(out / "figures")


def draw_all(out: Path) -> None:
    """Run every script in ``docs/figures``; each draws what its ``draw`` is given a path for."""
    out.mkdir(parents=True, exist_ok=True)
    for script in sorted(FIGURES.glob("[a-z]*.py")):
        runpy.run_path(str(script))["draw"](out / f"{script.stem}.svg")
