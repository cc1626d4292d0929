"""Checkpoints whose files were damaged, replaced or made up: a line, a fall-back or what was saved, and nothing else.

150 random mutations, 3,000 with ``--exhaustive``; a failure names its number, which alone determines it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lorapre_dist import LoRAPre, checkpoint
from lorapre_dist.checkpoint import CheckpointError, folder, newest_whole
from lorapre_dist.checkpoint.folder import Manifest
from lorapre_dist.cli import main as lorapre

OLD, NEW = "step1", "step2"
#: Seconds after which a case is taken to hang.
LIMIT = 30.0


class Run:
    """A model with an optimizer of two groups, one of which changes its lr."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(9, 7), "norm": torch.nn.BatchNorm1d(5)})
        named = [(n, p) for n, p in self.model.named_parameters() if n.startswith("q_proj")]
        self.model["norm"].requires_grad_(False)
        self.optimizer = LoRAPre([{"params": [named[0]], "lr": 0.25}, {"params": named[1:]}], rank=2)

    def step(self) -> None:
        for p in self.optimizer.param_groups[0]["params"] + self.optimizer.param_groups[1]["params"]:
            p.grad = torch.randn_like(p)
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] /= 2

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {f"{n}.{k}": t for n, of in self.optimizer.factors().items() for k, t in of.items()}
        vectors = {f"{b.piece.name}.{k}": t for b in self.optimizer.bound() for k, t in b.state.tensors().items()}
        return {**self.model.state_dict(), **state, **vectors}

    def values(self) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        steps = {b.piece.name: b.state.step for b in self.optimizer.bound()}
        return {"tensors": {k: t.clone() for k, t in self.tensors().items()}, "groups": repr(groups), "steps": steps}

    def clear(self) -> None:
        """A state that no checkpoint holds."""
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.zero_()
        for group in self.optimizer.param_groups:
            group["lr"] = 77.0
        for bound in self.optimizer.bound():
            bound.state.step = 0


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    rest = all(a[key] == b[key] for key in ("groups", "steps"))
    return rest and all(torch.equal(t, b["tensors"][k]) for k, t in a["tensors"].items())


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture(scope="module")
def saved(run: Run, tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder with two checkpoints, and what each must bring back."""
    path, values = tmp_path_factory.mktemp("saved") / "run", {}

    def hugging_face(into: Path) -> None:
        (into / "hf").mkdir()
        (into / "hf" / "config.json").write_text('{"model_type": "llama"}')

    for step, tag in enumerate((OLD, NEW), 1):
        run.step()
        extra = {"tag": tag, "rng": torch.arange(step)}
        checkpoint.save(run.model, run.optimizer, path, tag, step=step, extra=extra, also=hugging_face)
        values[tag] = run.values() | {"extra": extra}
    return path, values


# mutations ------------------------------------------------------------------------------------------------------------

Change = Callable[[Path, random.Random], None]


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def grow(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.choice((1, 100, 100_000))))


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def noise(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(path.stat().st_size))


def json_of(path: Path, chance: random.Random) -> None:
    texts = [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        '"text"',
        "1e999",
        "Infinity",
        "{}",
        '{"format": 1}',
        "\ufeff{}",
    ]
    path.write_text(chance.choice(texts))


def other_kind(path: Path, chance: random.Random) -> None:
    """A link (to the true content, to nothing, to what has no end, to itself), a FIFO, a socket or a folder."""
    kind = chance.choice(("twin", "nothing", "endless", "itself", "fifo", "socket", "folder"))
    content = path.read_bytes()
    path.unlink()
    if kind == "twin":
        outside = path.parents[3] / "outside"
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # a path of its own may be too long
        os.close(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"nothing": "/no/such/file", "endless": "/dev/zero", "itself": path}[kind])


def from_elsewhere(path: Path, chance: random.Random) -> None:
    """Another file's content, of this checkpoint or of the older one."""
    others = [p for p in path.parents[2].rglob("*") if p.is_file() and p != path]
    path.write_bytes(chance.choice(sorted(others)).read_bytes())


DAMAGE: list[Change] = [
    flip,
    flip,
    flip,
    cut,
    cut,
    grow,
    remove,
    noise,
    json_of,
    other_kind,
    other_kind,
    from_elsewhere,
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in inner:
        yield (*path, key)
        yield from places(found, (*path, key))


def wrong_type(content: Any, chance: random.Random) -> None:
    """One value of JSON, of a type that its place cannot have."""
    *way, last = chance.choice([place for place in places(content) if place != ("version",)])
    for key in way:
        content = content[key]
    number = isinstance(content[last], (int, float)) and not isinstance(content[last], bool)
    kinds = {dict: [None, 7, "x", []], list: [7, "x", {}], str: [7, [], {}]}
    huge = [-1, 1 << 70, 10**300] if isinstance(content[last], int) else [float("inf"), float("nan")]
    if "param_groups" in way:  # a seed may be as large as it likes
        huge = [value for value in huge if value in (-1, float("inf"))]
    content[last] = chance.choice(["x", [], {}, *huge] if number else kinds.get(type(content[last]), [{}]))


def crafted_json(tag: Path, chance: random.Random) -> None:
    file = tag / "checkpoint.json"
    content = json.loads(file.read_text())
    wrong_type(content, chance)
    file.write_text(json.dumps(content))
    reseal(tag)


def crafted_manifest(tag: Path, chance: random.Random) -> None:
    """Of before it had a checksum, and wrong."""
    content = old_manifest(tag)
    wrong_type(content, chance)
    (tag / "manifest.json").write_text(json.dumps(content))


def crafted_step(tag: Path, chance: random.Random) -> None:
    content = old_manifest(tag)
    content["step"] = chance.choice((0, 1, 3, 1 << 62))
    (tag / "manifest.json").write_text(json.dumps(content))


def flipped_old_manifest(tag: Path, chance: random.Random) -> None:
    (tag / "manifest.json").write_text(json.dumps(old_manifest(tag)))
    flip(tag / "manifest.json", chance)


def crafted_metadata(tag: Path, chance: random.Random) -> None:
    """What DCP's records say, changed in one place."""
    file = tag / "tensors" / ".metadata"
    metadata: Metadata = pickle.loads(file.read_bytes())
    name = chance.choice(sorted(metadata.state_dict_metadata))
    entry = metadata.state_dict_metadata[name]
    index = chance.choice([i for i in metadata.storage_data if i.fqn == name])
    at, chunk = metadata.storage_data[index], entry.chunks[0]
    absurd = [-1, 1 << 40, 1 << 70, None, "x", 1.5]
    kind = chance.choice(("path", "offset", "length", "size", "chunk", "place", "dtype", "nothing", "kind", "twice"))
    if kind == "path":
        names = ["../../step1/tensors/__0_0.distcp", "/etc/passwd", str(tag / "extra.pt"), "", ".", 7, None, "x\0y"]
        at.relative_path = chance.choice([*names, "../extra.pt", "__9_9.distcp", ".metadata"])
    elif kind in ("offset", "length"):
        setattr(at, kind, chance.choice(absurd))
    elif kind == "size":
        entry.size = chance.choice([torch.Size([1 << 40]), torch.Size([1 << 40, 0]), torch.Size([]), None, (1, "x")])
    elif kind == "chunk":
        chunk.sizes = chance.choice([torch.Size([1 << 40]), torch.Size([0]), torch.Size([]), None, torch.Size([-1])])
    elif kind == "place":
        chunk.offsets = chance.choice([torch.Size([1]), torch.Size([]), None, torch.Size([-1] * len(entry.size))])
    elif kind == "dtype":
        object.__setattr__(entry.properties, "dtype", chance.choice([torch.int8, torch.float64, None, "float32"]))
    elif kind == "nothing":
        del metadata.storage_data[index]
    elif kind == "kind":
        metadata.state_dict_metadata[name] = chance.choice([None, chunk, [], at])
    else:
        entry.chunks.append(chunk)
    file.write_bytes(pickle.dumps(metadata))
    reseal(tag)


def crafted_extra(tag: Path, chance: random.Random) -> None:
    """Another form of what is saved beside the tensors."""
    state = torch.load(tag / "extra.pt", weights_only=True)
    wrong = chance.choice([None, [], 7, "x", {"engine": 1}, {"engine": {}, "client_state": {}}, "steps", "schedule"])
    if wrong == "steps":
        wrong = {**state, "engine": {**state["engine"], "global_steps": "x"}}
    elif wrong == "schedule":
        wrong = {**state, "engine": {**state["engine"], "lr_scheduler": [1]}}
    torch.save(wrong, tag / "extra.pt")
    reseal(tag)


CRAFTED: list[Change] = [
    *(crafted_json, crafted_json, crafted_manifest, crafted_step, flipped_old_manifest),
    *(crafted_metadata, crafted_metadata, crafted_extra),
]


def reseal(tag: Path) -> None:
    """As if the checkpoint had been written so."""
    files = {name: folder.describe(tag / name) for name in folder.files_in(tag)}
    Manifest(tag.name, json.loads((tag / "manifest.json").read_text())["step"], files).write(tag)


def old_manifest(tag: Path) -> dict[str, Any]:
    content = json.loads((tag / "manifest.json").read_text())
    del content["blake2b"]
    return content


def mutate(path: Path, chance: random.Random) -> str:
    """Change something in a copy of the folder; what and where."""
    tag = path / NEW
    if chance.random() < 0.35:
        change = chance.choice(CRAFTED)
        change(tag, chance)
        return change.__name__
    names = [*folder.files_in(tag), *["manifest.json"] * 3]
    file = chance.choice([tag / chance.choice(names), tag / chance.choice(names), path / "latest"])
    change = chance.choice(DAMAGE)
    change(file, chance)
    return f"{change.__name__} {file.relative_to(path)}"


# what may come of it --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_line(text: str) -> bool:
    return bool(text) and "\n" not in text and "Traceback" not in text and text.isprintable()


def loads(run: Run, path: Path, tag: str | None, want: dict[str, dict[str, Any]]) -> str | None:
    """What a load says, having changed nothing; None where it brought back what was saved."""
    run.clear()
    before = run.values()
    try:
        extra = checkpoint.load(run.model, run.optimizer, path, tag)
    except CheckpointError as error:
        assert is_line(str(error)), str(error)
        assert same(run.values(), before)
        return str(error)
    values = want[tag or NEW]
    assert (
        extra is not None
        and extra["tag"] == values["extra"]["tag"]
        and torch.equal(extra["rng"], values["extra"]["rng"])
    )
    assert same(run.values(), values)
    return None


def check(run: Run, path: Path, want: dict[str, dict[str, Any]], number: int) -> None:
    chosen, complaints = newest_whole(path)
    assert chosen is not None and chosen.name in want, complaints
    assert all(is_line(text) for text in complaints), complaints
    if chosen.name == OLD:
        assert any(f"{path}/{NEW}" in text for text in complaints), complaints
        assert loads(run, path, OLD, want) is None
    said = loads(run, path, None, want)
    assert chosen.name == NEW or said is not None
    assert said is None or NEW in said or "latest" in said, said
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        codes = [lorapre(["inspect", str(path)])]
        if number % 3 == 0:
            codes.append(lorapre(["inspect", str(path / NEW), "--tensors"]))
        elif number % 3 == 1:
            codes.append(lorapre(["consolidate", str(path / NEW), str(path.parent / "whole")]))
    assert set(codes) <= {0, 1, 2}
    lines = err.getvalue().splitlines()
    assert len(lines) == codes.count(2) and all(line.startswith("error: ") for line in lines), err.getvalue()
    if complaints:
        assert codes[0] == 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_nothing_else_ever_comes_of_a_mutation(run, saved, tmp_path, exhaustive):
    origin, want = saved
    for number in range(3000 if exhaustive else 150):
        path, chance, what = tmp_path / str(number) / "run", random.Random(number), "?"
        shutil.copytree(origin, path)
        try:
            what = mutate(path, chance)
            with at_most(LIMIT):
                check(run, path, want, number)
        except BaseException as error:
            raise AssertionError(f"mutation {number}, {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(path.parent)


def test_without_a_mutation_all_is_well(run, saved, tmp_path):
    origin, want = saved
    path = Path(shutil.copytree(origin, tmp_path / "run"))
    assert newest_whole(path) == (path / NEW, [])
    assert loads(run, path, None, want) is None
    (path / NEW / "manifest.json").write_text(json.dumps(old_manifest(path / NEW)))  # of earlier versions
    assert newest_whole(path) == (path / NEW, [])
    assert loads(run, path, None, want) is None
    assert lorapre(["inspect", str(path)]) == 0
