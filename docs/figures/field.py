"""The recorded runs of ``bench field``: loss against steps, bytes of state and time."""

from __future__ import annotations

from pathlib import Path

from generate.results import FIELD, field_runs

from lorapre_dist.bench.field import report


def draw(out: Path) -> None:
    """Write the figure."""
    report.figure(report.rows(field_runs(), FIELD)).savefig(out)
