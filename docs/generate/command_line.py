"""The options of every program, from its parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from lorapre_dist import cli
from lorapre_dist.launcher import app as launcher
from lorapre_dist.training.finetune import settings as finetune
from lorapre_dist.training.run import settings as pretrain
from lorapre_dist.training.run.settings import default_cache


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every program of the package: the name of its section, and its parser."""
    for name in cli.COMMANDS:
        yield f"lorapre {name}", cli._parser_of(name)
    yield "lorapre pretrain", pretrain.build_parser()
    yield "lorapre finetune", finetune.build_parser()
    yield "lorapre launch", launcher.build_parser()


def write(out: Path) -> None:
    """One Markdown file with a section for every program."""
    out.mkdir(parents=True, exist_ok=True)
    sections = [section(name, parser) for name, parser in parsers()]
    (out / "all.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def section(name: str, parser: argparse.ArgumentParser) -> str:
    """What a program is for, and a table of its options by argparse's groups."""
    parts = [f"## {name}", _sentence(parser.description)]
    for group in parser._action_groups:
        rows = [_row(action, parser) for action in group._group_actions if action.help != argparse.SUPPRESS]
        if rows:
            own = group.title not in ("options", "positional arguments", "optional arguments")
            parts += [f"**{group.title}**"] * own + ["| | |\n|---|---|\n" + "\n".join(rows)]
    return "\n\n".join(part for part in parts if part)


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    formatter = parser._get_formatter()
    if action.option_strings:
        value = "" if action.nargs == 0 else " " + formatter._format_args(action, action.dest.upper())
        shown = ", ".join(action.option_strings) + value
    else:
        shown = str(action.metavar or action.dest)
    text = formatter._expand_help(action) if action.help else ""
    text = text.replace(default_cache(), "$LORAPRE_CACHE, else ~/.cache/lorapre_dist")  # not of whoever builds the site
    return f"| `{_cell(shown)}` | {_cell(_escaped(text))} |"


def _sentence(text: str | None) -> str:
    return _escaped(" ".join((text or "").split()))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _escaped(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return re.sub(r"([\\`*_<>\[\]$#{}])", r"\\\1", text)
