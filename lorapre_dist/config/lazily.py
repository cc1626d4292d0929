"""Attributes of a package that are imported when they are asked for (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attributes(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``.

    Args:
        where: the module of each attribute, relative to the package (``"run"``, ``".integrations"`` of the one above);
            for one that is a module itself, that module.
    """
    module = sys.modules[package]

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = importlib.import_module(f".{where[name]}", package)
        value = found if where[name].rpartition(".")[2] == name else getattr(found, name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted({*vars(module), *where})
