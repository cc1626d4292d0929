"""What is in a checkpoint, and whether it is whole; one process, no ``torch.distributed``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.arguments import readable
from ..state.shards import OPTIMIZER
from . import content, folder, run, stored
from .entries import RANKS
from .files import CheckpointError, shown
from .folder import Manifest

#: In place of a layout, where DeepSpeed has written the files for an optimizer of its own.
OTHERS = "DeepSpeed's own"
KINDS = {"lorapre": "low-rank", "adamw": "AdamW", "untrained": "untrained"}


def describe(path: Path) -> dict[str, Any]:
    """A checkpoint's content in plain values; what cannot be read is left out and named in ``problems``.

    Keys: ``path``, ``tag``, ``whole``, ``problems``, ``files`` (bytes by name), ``step``, ``layout``, ``world_size``,
    ``lr`` (of each parameter group), ``ranks``, ``count`` (of tensors by kind), ``aliases``, ``frozen``, ``bytes``
    (``weights``, ``optimizer``), ``extra`` (keys), ``parameters``. Of a checkpoint that DeepSpeed has written for an
    optimizer of its own, those up to ``step``, and ``layout``.
    """
    problems = stored.problems(path)
    found: dict[str, Any] = {"path": str(path), "tag": path.name, "whole": not problems, "problems": problems}
    found["files"] = {shown(name): (path / name).lstat().st_size for name in folder.files_in(path)}
    if not problems and stored.others(manifest := Manifest.read(path)):
        return found | {"step": manifest.step, "layout": OTHERS}
    # Each part by itself: a damaged checkpoint shows whatever is left of it.
    parts = {content.FILE: _content, f"{content.TENSORS}/.metadata": _bytes, run.EXTRA: _extra}
    for name, part in parts.items():
        if any(problem.startswith((name, folder.MANIFEST)) for problem in problems):
            continue  # what is not as it was written is not looked into
        try:
            found.update(part(path))
        except Exception as error:  # anything may be in a damaged file
            if not problems:
                raise CheckpointError(f"checkpoint {path} cannot be described: {error}") from error
    return found


def _content(path: Path) -> dict[str, Any]:
    described = content.read(path)
    plain = described.to_json()
    held = Counter((e.optimizer, e.variant, e.ranks["m"], e.ranks.get("v")) for e in described.low_rank.values())
    counts = Counter(entry.kind for entry in described.parameters.values())
    return {
        **{key: plain[key] for key in ("step", "layout", "world_size")},
        "lr": [group.get("lr") for group in described.param_groups],
        "ranks": [
            {"optimizer": o, "variant": v, "rank": r, "rank_v": s, "tensors": n}
            for (o, v, r, s), n in sorted(held.items(), key=str)
        ],
        "count": {kind: counts[kind] for kind in KINDS},
        **{key: plain[key] for key in ("aliases", "frozen", "parameters")},
    }


def _bytes(path: Path) -> dict[str, Any]:
    sizes = {"weights": 0, "optimizer": 0}
    for name, tensor in stored.tensors(path).items():
        sizes["optimizer" if name.startswith(OPTIMIZER) else "weights"] += tensor.bytes
    return {"bytes": sizes}


def _extra(path: Path) -> dict[str, Any]:
    extra = run.read_extra(path)
    return {"extra": {str(key): sorted(map(str, v)) if isinstance(v, dict) else [] for key, v in extra.items()}}


def overview(directory: Path) -> list[dict[str, Any]]:
    """The checkpoints in a folder, newest first: ``tag``, ``latest``, ``whole``, ``problems``, ``bytes`` of all files,
    and, where they can be read, ``step``, ``layout`` and ``world_size``.
    """
    latest = None if folder.latest_problem(directory) else folder.latest(directory)
    found = []
    for path in folder.checkpoints(directory):
        if folder.consolidated(path):
            continue
        problems = stored.problems(path)
        line: dict[str, Any] = {"tag": path.name, "latest": path.name == latest, "whole": not problems}
        line["problems"] = problems
        line["bytes"] = sum((path / name).lstat().st_size for name in folder.files_in(path))
        with contextlib.suppress(Exception):  # anything may be in a damaged file; ``problems`` names it
            manifest = Manifest.read(path)
            line["step"] = manifest.step
            plain = {"layout": OTHERS} if stored.others(manifest) else content.read(path).to_json()
            line.update({key: plain[key] for key in ("step", "layout", "world_size") if key in plain})
        found.append(line)
    return found


# text ---------------------------------------------------------------------------------------------------------------


def render(found: dict[str, Any], tensors: bool = False) -> str:
    """Lines for the terminal about what :func:`describe` found."""
    lines = [f"{found['path']}: {'whole' if found['whole'] else 'DAMAGED'}"]
    lines += [f"  problem        {problem}" for problem in found["problems"]]
    if found.get("layout") == OTHERS:
        lines.append(f"  step           {found['step']}, files are {OTHERS}")
    elif "step" in found:
        lines += _content_lines(found)
    if "bytes" in found:
        sizes = found["bytes"]
        lines.append(f"  weights        {readable(sizes['weights'])}, optimizer state {readable(sizes['optimizer'])}")
    lines += _file_lines(found["files"])
    for key, inner in found.get("extra", {}).items():
        lines.append(f"  {key:<14} {', '.join(inner) or '-'}")
    if tensors and "parameters" in found:
        lines += ["", *_tensor_lines(found["parameters"])]
    return "\n".join(lines)


def _content_lines(found: dict[str, Any]) -> list[str]:
    ranks = f"{found['world_size']} rank" + "s" * (found["world_size"] != 1)
    lines = [f"  step           {found['step']}, written by {ranks}, layout {found['layout']}"]
    for entry in found["ranks"]:
        several = f" ({entry['tensors']} tensors)" if len(found["ranks"]) > 1 else ""
        rank_v = "" if entry["rank_v"] is None else f", rank_v {entry['rank_v']}"
        lines.append(f"  {entry['optimizer']:<14} {entry['variant']}, rank {entry['rank']}{rank_v}{several}")
    lines.append(f"  lr             {', '.join(dict.fromkeys(_number(lr) for lr in found['lr']))}")
    lines.append("  tensors        " + ", ".join(f"{found['count'][kind]} {word}" for kind, word in KINDS.items()))
    if found["frozen"] == "excluded":
        lines.append("  frozen         parameters were left out when it was saved")
    lines += [f"  tied           {alias} is {name}" for alias, name in found["aliases"].items()]
    return lines


def _file_lines(files: dict[str, int]) -> list[str]:
    places: dict[str, list[int]] = {}
    for name, size in files.items():
        top, slash, _ = name.partition("/")
        places.setdefault(top + slash, []).append(size)
    total = f"  files          {len(files)}, {readable(sum(files.values()))}"
    width = max([len(name) for name in places], default=0)
    return [total] + [
        f"    {name:<{width}}  {readable(sum(sizes)):>10}" + (f" in {len(sizes)} files" if len(sizes) > 1 else "")
        for name, sizes in places.items()
    ]


def _tensor_lines(parameters: dict[str, dict[str, Any]]) -> list[str]:
    rows = [("tensor", "kind", "shape", "rank", "step")]
    for name, entry in parameters.items():
        rank = ", ".join(str(entry[key]) for key in RANKS.values() if key in entry) or "-"
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        rows.append((name, KINDS[entry["kind"]], shape, rank, str(entry.get("step", "-"))))
    return columns(rows)


def render_overview(found: list[dict[str, Any]], problem: str | None = None) -> str:
    """A table for the terminal of what :func:`overview` found, and what is wrong with ``latest``."""
    rows = [("tag", "step", "layout", "size", "state")]
    for line in found:
        layout = " x ".join(str(line[key]) for key in ("layout", "world_size") if key in line) or "?"
        state = "whole" if line["whole"] else "; ".join(line["problems"][:2])
        more = f"; and {len(line['problems']) - 2} more" if len(line["problems"]) > 2 else ""
        tag = line["tag"] + " (latest)" * line["latest"]
        rows.append((tag, str(line.get("step", "?")), layout, readable(line["bytes"]), state + more))
    return "\n".join([*columns(rows), *([problem] if problem else [])])


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
