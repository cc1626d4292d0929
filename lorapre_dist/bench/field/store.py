"""The results folder of ``bench field``: one line of JSON for every run, which is never done again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError

from .setting import Setting

Record = dict[str, Any]
NAME = "runs.jsonl"


class Store:
    """The records of a file, by the settings that they depend on.

    Raises:
        ConfigError: a line of it is no record; the last one, which a killed process leaves cut, is passed by.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Setting, Record] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    record = json.loads(line)
                    self.records[Setting.of(record)] = record
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise ConfigError(f"{path}, line {number}: not a record of bench field; remove the line") from None
        self._cut = bool(lines and lines[-1])

    def add(self, record: Record) -> None:
        """Append a run's record."""
        self.records[Setting.of(record)] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._cut + json.dumps(record) + "\n")
        self._cut = False

    def get(self, setting: Setting) -> Record | None:
        """The record of a run that has been done; those that failed have an ``error``."""
        return self.records.get(setting)

    def forget_errors(self) -> None:
        """Let runs that failed be missing, so that they are tried again; the file keeps what it has."""
        self.records = {setting: record for setting, record in self.records.items() if "error" not in record}

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())
