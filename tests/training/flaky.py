"""``flaky://``: local files whose reads fail on demand, as an fsspec file system that ``datasets`` streams from."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Outage:
    """Which reads fail: ``failures`` of them after ``good`` ones, and all while the file ``$FLAKY_OUTAGE`` exists."""

    good = failures = 0

    @classmethod
    def strike(cls) -> None:
        if Path(os.environ.get("FLAKY_OUTAGE", "/nonexistent")).exists():
            raise ConnectionResetError("connection reset by the storage")
        if cls.good > 0:
            cls.good -= 1
        elif cls.failures > 0:
            cls.failures -= 1
            raise ConnectionResetError("connection reset by the storage")


class _Raw(io.FileIO):
    def readinto(self, buffer: Any) -> int | None:
        Outage.strike()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        Outage.strike()
        return super().readall()


class FlakyFileSystem(LocalFileSystem):
    protocol = "flaky"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        return "/" + str(path).removeprefix("flaky://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return io.BufferedReader(_Raw(self._strip_protocol(path)), 4096)


def register() -> None:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
