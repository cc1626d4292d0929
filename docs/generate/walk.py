"""The walk of a gradient through a step, followed while it happens: which function of which file, in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lorapre_dist
from lorapre_dist import LoRAPre

ROOT = Path(lorapre_dist.__file__).parent
#: Calls deeper than this are no longer the walk, but what is done on the way.
DEPTH = 5
Call = tuple[int, str, str, str]  # depth, file, function, first sentence of its docstring


def write(out: Path) -> None:
    """The walk as a nested list, and how many files and functions there are."""
    calls = list(walk())
    files = {file for _, file, _, _ in calls}
    lines = [f"{'  ' * depth}- `{file}`: `{name}`. {sentence}" for depth, file, name, sentence in calls]
    text = f"{len(calls)} functions in {len(files)} files:\n\n" + "\n".join(lines) + "\n"
    out.write_text(text, encoding="utf-8")


def walk() -> Iterator[Call]:
    """Each function once, of those that say in a docstring what they do; settings and properties apart."""
    seen: set[str] = set()
    shallower = -1
    for depth, code in _calls():
        name, file = code.co_qualname, str(Path(code.co_filename).relative_to(ROOT))
        says = code.co_consts[0] if code.co_consts and isinstance(code.co_consts[0], str) else ""
        room = file.split("/")[0]
        if depth > DEPTH or room not in ("optimizers", "core") or "<" in name or not says or name in seen:
            continue
        if _is_property(file, name):
            continue
        seen.add(name)
        shallower = min(depth, shallower + 1)
        yield shallower, file, name, says.split("\n")[0].replace("``", "`")


def _is_property(file: str, name: str) -> bool:
    found: Any = sys.modules[f"lorapre_dist.{file.removesuffix('.py').replace('/', '.')}"]
    for part in name.split("."):
        found = vars(found)[part]
    return isinstance(found, property)


def _calls() -> Iterator[tuple[int, Any]]:
    """Every call of a function of the package in one step of one matrix on one device, and how deep it is."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(24, 16))
    optimizer = LoRAPre([("layers.0.q_proj.weight", parameter)], lr=1e-3, rank=4)
    found: list[tuple[int, Any]] = []
    depth = 0

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        if frame.f_code.co_filename.startswith(str(ROOT)):
            if event == "call":
                found.append((depth, frame.f_code))
            depth += {"call": 1, "return": -1}.get(event, 0)

    for step in range(3):  # what the first ones do once is no part of the walk
        parameter.grad = torch.randn_like(parameter)
        sys.setprofile(see if step == 2 else None)
        optimizer.step()
        sys.setprofile(None)
    return iter(found)
