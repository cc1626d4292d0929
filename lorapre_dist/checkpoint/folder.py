"""A checkpoint as a folder: complete or not there, with the size and checksum of every file.

A save writes to ``DIR/.TAG.partial``. When all files are synced, ``manifest.json`` is added and the folder renamed to
``DIR/TAG``; ``DIR/latest`` (a text file with the tag, as DeepSpeed has it) is replaced last. So whatever dies when,
a folder without leading dot is whole, or was damaged afterwards, and then the manifest shows it.

    manifest.json  {"format": 1, "tag": TAG, "step": n, "files": {NAME: {"bytes": n, "blake2b": hex}}}

Nothing here is collective; :mod:`lorapre_dist.checkpoint.run` divides the work among ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1
_REPLACED = ".replaced"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or used. The message names the folder and what is wrong with it."""


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
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"checkpoint {folder} is of format {content['format']!r}; this version reads format {FORMAT}"
                )
            return cls(content["tag"], int(content["step"]), dict(content["files"]))
        except FileNotFoundError:
            raise CheckpointError(
                f"checkpoint {folder} has no {MANIFEST}: it was not completed, or not written by this version "
                "of lorapre_dist"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {folder}: {MANIFEST} cannot be read ({error})") from error

    def write(self, folder: Path) -> None:
        """Write it, durably."""
        content = {"format": FORMAT, "tag": self.tag, "step": self.step, "files": self.files}
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1))


def partial(directory: Path, tag: str) -> Path:
    """Where a checkpoint is written before it is complete."""
    return directory / f".{tag}.partial"


def files_in(folder: Path) -> list[str]:
    """Every file of a checkpoint but the manifest, by relative name, sorted."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != MANIFEST)


def describe(path: Path) -> dict[str, Any]:
    """Bytes and checksum of a file, which is synced to storage first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": _digest(file)}


def damage(folder: Path, manifest: Manifest, share: slice = slice(None)) -> list[str]:
    """What is wrong with the files of a checkpoint, in words; only those in ``share`` are read through."""
    present, expected = set(files_in(folder)), manifest.files
    found = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    found += [f"{name} does not belong to it" for name in sorted(present - expected.keys())]
    for name in sorted(expected.keys() & present)[share]:
        path, wanted = folder / name, expected[name]
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                found.append(f"{name} has {size} bytes instead of {wanted['bytes']}")
                continue
            with open(path, "rb") as file:
                if _digest(file) != wanted["blake2b"]:
                    found.append(f"{name} has a wrong checksum")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def publish(directory: Path, manifest: Manifest, save_latest: bool) -> Path:
    """Make the partial checkpoint visible under its tag, replacing one of that name, and point ``latest`` at it."""
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
    """Finish a save that was killed after its files were complete, while it replaced an older checkpoint of its tag."""
    for left in directory.glob(".*.partial"):
        target = directory / left.name.removeprefix(".").removesuffix(".partial")
        if (left / MANIFEST).is_file() and not target.exists() and not target.name.endswith(_REPLACED):
            left.rename(target)


def start(directory: Path, tag: str) -> Path:
    """An empty partial folder; what killed saves left behind is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    recover(directory)
    for left in directory.glob(".*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    folder = partial(directory, tag)
    folder.mkdir()
    return folder


def checkpoints(directory: Path) -> list[Path]:
    """Folders that may be checkpoints, newest first: by the manifest's step, those without a manifest last."""
    if not directory.is_dir():
        return []
    folders = [p for p in directory.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(folders, key=_age, reverse=True)


def _age(folder: Path) -> tuple[int, float]:
    try:
        return Manifest.read(folder).step, folder.stat().st_mtime
    except (CheckpointError, OSError):
        return -1, 0.0


def latest(directory: Path) -> str | None:
    """The tag that ``latest`` names, None if there is no such file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def choose(directory: Path, tag: str | None) -> list[str] | str:
    """The tag in a list, which is empty if there is nothing to load; a complaint as a string."""
    recover(directory)
    present = [p.name for p in checkpoints(directory)]
    if tag is None:
        tag = latest(directory)
        if tag is None:
            return f"{directory} has no file {LATEST!r}; name one of: {', '.join(present)}" if present else []
    if tag not in present:
        return f"no checkpoint {tag!r} in {directory}; there: {', '.join(present) or 'none'}"
    return [str(tag)]


def prune(directory: Path, keep_last: int, keep: str) -> list[str]:
    """Delete all but the newest ``keep_last`` complete checkpoints, never the one tagged ``keep``; the tags deleted."""
    deleted = []
    for folder in [p for p in checkpoints(directory) if (p / MANIFEST).is_file()][keep_last:]:
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
