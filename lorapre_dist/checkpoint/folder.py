"""A checkpoint as a folder: complete or not there, with the size and checksum of every file.

A save writes to ``DIR/.TAG.partial``. When all files are synced, ``manifest.json`` is added and the folder renamed to
``DIR/TAG``; ``DIR/latest`` (a text file with the tag, as DeepSpeed has it) is replaced last. So whatever dies when,
a folder without leading dot is whole, or was damaged afterwards, and then the manifest shows it.

    manifest.json  {"format": 1, "tag": TAG, "step": n, "files": {NAME: {"bytes": n, "blake2b": hex}}, "blake2b": hex}

The last is the checksum of the rest (:func:`_sealed`); manifests of earlier versions have none. A checkpoint has
folders and regular files, nothing else: no links, no FIFOs.

Nothing here is collective; :mod:`lorapre_dist.checkpoint.run` divides the work among ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, lock
from .files import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
#: What our tensors are; :mod:`lorapre_dist.checkpoint.content` reads it.
DESCRIPTION = "checkpoint.json"
FORMAT = 1
#: What ``consolidate`` writes, in place of a manifest.
WEIGHTS_INDEX = "model.safetensors.index.json"
_REPLACED = ".replaced"
_KEYS = ("format", "tag", "step", "files")
_CHECKSUM = "blake2b"
# A name of a folder has no more bytes.
_TAG_BYTES = 255


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        files: bytes and checksum of each file by name relative to the folder.
    """

    tag: str
    step: int
    files: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: missing, damaged or of another format.
        """
        try:
            content = files.read_object(folder / MANIFEST)
        except FileNotFoundError:
            raise CheckpointError(
                f"checkpoint {folder} has no {MANIFEST}: it was not completed, or not written by this version "
                "of lorapre_dist"
            ) from None
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{folder / MANIFEST} ")
            raise CheckpointError(f"checkpoint {folder}: {MANIFEST} {reason}") from error
        if "format" in content and content["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} is of format {content['format']!r:.80}; this version reads format {FORMAT}"
            )
        if problem := _problem(content) or _disagreement(folder, content):
            raise CheckpointError(f"checkpoint {folder}: {MANIFEST} {problem}")
        return cls(content["tag"], content["step"], content["files"])

    def write(self, folder: Path) -> None:
        """Write it, durably."""
        content = {"format": FORMAT, "tag": self.tag, "step": self.step, "files": self.files}
        write_atomically(folder / MANIFEST, json.dumps({**content, _CHECKSUM: _sealed(content)}, indent=1))


def _sealed(content: dict[str, Any]) -> str:
    """Checksum of a manifest without its checksum."""
    encoded = json.dumps({key: content[key] for key in _KEYS}, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def _problem(content: dict[str, Any]) -> str | None:
    """What is wrong with a manifest, in words."""
    if missing := [key for key in _KEYS if key not in content]:
        return f"has no {missing[0]!r}"
    # A checksum whose name is damaged must not pass for none.
    if unknown := [key for key in content if key not in (*_KEYS, _CHECKSUM)]:
        return f"has an entry {unknown[0]!r:.80} that does not belong there"
    if _CHECKSUM in content and content[_CHECKSUM] != _sealed(content):
        return "has a wrong checksum"
    if not files.is_count(content["step"]):
        return f"says step {content['step']!r:.80}, which is no whole number"
    if not isinstance(content["tag"], str) or not isinstance(content["files"], dict):
        return "has a tag that is no text, or files that are no list by name"
    for name, entry in content["files"].items():
        if not files.is_inside(name):
            return f"names a file {name!r:.80} outside of the checkpoint"
        told = isinstance(entry, dict) and files.is_count(entry.get("bytes"))
        if not told or not isinstance(entry.get("blake2b"), str):
            return f"does not say size and checksum of {name!r:.80}"
    return None


def _disagreement(folder: Path, content: dict[str, Any]) -> str | None:
    """Where a manifest differs from what it describes, in words; None for a checkpoint of another optimizer."""
    if DESCRIPTION not in content["files"]:
        return None
    try:
        step = files.read_object(folder / DESCRIPTION).get("step")
    except (CheckpointError, OSError):
        return None  # which its checksum shows
    return None if step == content["step"] else f"says step {content['step']}, {DESCRIPTION} says {step!r:.80}"


def partial(directory: Path, tag: str) -> Path:
    """Where a checkpoint is written before it is complete."""
    return directory / f".{tag}.partial"


def entries(folder: Path) -> dict[str, str | None]:
    """What lies in a checkpoint, by relative name, sorted: None for a file, else what it is.

    Neither its manifest nor its folders are in it.
    """
    found: dict[str, str | None] = {}
    within = [""]
    while within:
        prefix = within.pop()
        with os.scandir(folder / prefix) as scan:
            for entry in scan:
                if entry.is_dir(follow_symlinks=False):
                    within.append(f"{prefix}{entry.name}/")
                else:
                    found[prefix + entry.name] = files.kind(entry.stat(follow_symlinks=False).st_mode)
    found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def files_in(folder: Path) -> list[str]:
    """Every file of a checkpoint but the manifest, by relative name, sorted."""
    return [name for name, kind in entries(folder).items() if kind is None]


def describe(path: Path) -> dict[str, Any]:
    """Bytes and checksum of a file, which is synced to storage first."""
    with files.opened(path) as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": _digest(file)}


def damage(folder: Path, manifest: Manifest, share: slice = slice(None)) -> list[str]:
    """What is wrong with the files of a checkpoint, in words; only those in ``share`` are read through."""
    present, expected = entries(folder), manifest.files
    regular = {name for name, kind in present.items() if kind is None}
    found = [f"{files.shown(name)} is {kind}, not a file" for name, kind in present.items() if kind]
    found += [f"{files.shown(name)} is missing" for name in sorted(expected.keys() - present.keys())]
    found += [f"{files.shown(name)} does not belong to it" for name in sorted(regular - expected.keys())]
    for name in sorted(expected.keys() & regular)[share]:
        path, wanted = folder / name, expected[name]
        try:
            with files.opened(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != wanted["bytes"]:
                    found.append(f"{files.shown(name)} has {size} bytes instead of {wanted['bytes']}")
                elif _digest(file) != wanted["blake2b"]:
                    found.append(f"{files.shown(name)} has a wrong checksum")
        except OSError as error:
            found.append(f"{files.shown(name)} cannot be read ({error.strerror})")
    return found


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def publish(directory: Path, manifest: Manifest, save_latest: bool) -> Path:
    """Make the partial checkpoint visible under its tag, replacing one of that name, and point ``latest`` at it."""
    try:
        return _publish(directory, manifest, save_latest)
    finally:
        lock.release(directory)


def discard(path: Path) -> None:
    """Remove a partial folder that will not become a checkpoint."""
    shutil.rmtree(path, ignore_errors=True)
    lock.release(path.parent)


def _publish(directory: Path, manifest: Manifest, save_latest: bool) -> Path:
    source, target = partial(directory, manifest.tag), directory / manifest.tag
    for folder in (source, *(p for p in source.rglob("*") if p.is_dir())):
        _sync(folder)
    manifest.write(source)
    replaced = partial(directory, manifest.tag + _REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    _sync(directory)
    if save_latest:
        write_atomically(directory / LATEST, manifest.tag)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def recover(directory: Path) -> None:
    """Finish a save that was killed after its files were complete, while it replaced an older checkpoint of its tag.

    One that is still going on is left alone.
    """
    if lock.has(directory):
        _recover(directory)
    elif next(directory.glob(".*.partial"), None) is not None:
        with contextlib.suppress(OSError):  # where nothing can be written nothing can be finished
            if lock.take(directory, wait=0.0) is None:
                _recover(directory)
        lock.release(directory)


def _recover(directory: Path) -> None:
    for left in directory.glob(".*.partial"):
        target = directory / left.name.removeprefix(".").removesuffix(".partial")
        if (left / MANIFEST).is_file() and not target.exists() and not target.name.endswith(_REPLACED):
            left.rename(target)


def start(directory: Path, tag: str) -> Path:
    """An empty partial folder; what killed saves left behind is removed.

    From here to :func:`publish` or :func:`discard` no other process may save in ``directory``.

    Raises:
        CheckpointError: one does; the message names it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if holder := lock.take(directory):
        raise CheckpointError(f"another process saves in {directory}: {holder}")
    _recover(directory)
    for left in directory.glob(".*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    folder = partial(directory, tag)
    folder.mkdir()
    return folder


def checkpoints(directory: Path) -> list[Path]:
    """Folders that may be checkpoints, newest first: by the manifest's step, those without a manifest last."""
    if not directory.is_dir():
        return []
    folders = [p for p in directory.iterdir() if not p.name.startswith(".") and p.is_dir()]
    return sorted(folders, key=_age, reverse=True)


def candidates(directory: Path) -> list[Path]:
    """As :func:`checkpoints`, but those whose age cannot be read come first, as each may be the newest."""
    found = [p for p in checkpoints(directory) if not consolidated(p)]
    return sorted(found, key=lambda p: _age(p)[0] >= 0)


def consolidated(folder: Path) -> bool:
    """Whether it is what ``consolidate`` wrote, which is no checkpoint."""
    return (folder / WEIGHTS_INDEX).exists() and not os.path.lexists(folder / MANIFEST)


def _age(folder: Path) -> tuple[int, float]:
    try:
        return Manifest.read(folder).step, folder.stat().st_mtime
    except (CheckpointError, OSError):
        return -1, 0.0


def latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or what it holds is no name of a folder.
    """
    try:
        tag = files.read_text(directory / LATEST, _TAG_BYTES + 1).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if "/" in tag or not tag.isprintable() or tag.startswith("."):
        raise CheckpointError(f"{directory / LATEST} names {tag!r:.80}, which cannot be a checkpoint")
    return tag or None


def choose(directory: Path, tag: str | None) -> list[str] | str:
    """The tag in a list, which is empty if there is nothing to load; a complaint as a string."""
    recover(directory)
    present = [p.name for p in checkpoints(directory)]
    if tag is None:
        try:
            tag = latest(directory)
        except CheckpointError as error:
            return f"{error}; name one of: {', '.join(present) or 'none'}"
        if tag is None:
            return f"{directory} has no file {LATEST!r}; name one of: {', '.join(present)}" if present else []
    if tag not in present:
        return f"no checkpoint {tag!r} in {directory}; there: {', '.join(present) or 'none'}"
    return [str(tag)]


def latest_problem(directory: Path) -> str | None:
    """What is wrong with ``latest``, in words: it is missing, cannot be read, or names nothing."""
    try:
        tag = latest(directory)
    except CheckpointError as error:
        return str(error)
    if tag is None:
        return f"{directory} has no file {LATEST!r}"
    if tag not in [p.name for p in checkpoints(directory)]:
        return f"{directory / LATEST} names {tag!r}, which is not there"
    return None


def prune(directory: Path, keep_last: int, keep: str) -> list[str]:
    """Delete all but the newest ``keep_last`` complete checkpoints, never the one tagged ``keep``; the tags deleted.

    One whose manifest cannot be read stays: what it is, and how old, is for its owner to say.
    """
    deleted = []
    for folder in [p for p in checkpoints(directory) if _age(p)[0] >= 0][keep_last:]:
        if folder.name != keep:
            # Renamed first, so that a kill in the middle leaves no folder that looks like a checkpoint.
            doomed = partial(directory, folder.name)
            folder.rename(doomed)
            (doomed / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(doomed, ignore_errors=True)
            deleted.append(folder.name)
    return deleted


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to a new file."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, durable before it is visible."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # whatever it is: opening a FIFO would wait for ever
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Sync a folder's entries to storage, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
