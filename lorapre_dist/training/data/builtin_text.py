"""A corpus that needs no download: what this Python installation says about itself."""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
}

# Part of the cache key: change it when the documents change.
FORMAT = 1


def fingerprint() -> str:
    """Names the corpus: it differs between Python versions only."""
    return f"builtin-{FORMAT}-{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"


def documents() -> Iterator[str]:
    """The language reference's topics, then one document per standard module: its signatures and docstrings."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    # Some topics are there under two names.
    yield from dict.fromkeys(topics[name].strip() for name in sorted(topics))
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(root):
        text = module_document(path, ".".join(path.relative_to(root).with_suffix("").parts))
        if text:
            yield text


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in SKIPPED_FOLDERS and not s.startswith("config-"))
        for name in sorted(files):
            # The topics are documents of their own, and as a module one huge literal.
            if name.endswith(".py") and "pydoc_data" not in folder:
                yield Path(folder) / name


def module_document(path: Path, module: str) -> str:
    """Docstrings of the module in ``path`` with the signatures they belong to; empty if it has none."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError, OSError):
        return ""
    parts = list(_docstrings(tree, ""))
    own = ast.get_docstring(tree)
    if own:
        parts.insert(0, own)
    return f"Module {module}\n\n" + "\n\n".join(parts) if parts else ""


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            signature = f"def {prefix}{child.name}({ast.unparse(child.args)})"
        elif isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            signature = f"class {prefix}{child.name}({bases})"
        else:
            continue
        text = ast.get_docstring(child)
        if text:
            yield f"{signature}:\n    " + text.replace("\n", "\n    ")
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{prefix}{child.name}.")
