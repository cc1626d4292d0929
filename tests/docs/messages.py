"""The messages in the source: every string of the package, with ``…`` where a value goes."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
VALUE = "…"


def text_of(node: ast.expr) -> str:
    """What an expression of strings says; a value in it is ``…``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return VALUE


@functools.cache
def in_source() -> frozenset[str]:
    """All texts of the package's source, docstrings too."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((REPO / "lorapre_dist").rglob("*.py"))]
    texts = {text_of(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}
    return frozenset(text for text in texts if text.strip(VALUE))


def documented(page: Path) -> list[str]:
    """The first column of every table of a page whose head is "message"."""
    found, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| message |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            message = re.match(r"\| `(.+?)` \|", line)
            assert message, line
            found.append(message[1])
    return found


def is_in_source(message: str) -> bool:
    """Whether some text of the source says it."""
    return any(_in_order(message.split(VALUE), text) for text in in_source())


def _in_order(parts: list[str], text: str) -> bool:
    """Whether a text has all the parts, one after the other."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True
