"""Which files a name means: a file, a folder, or a glob. Nothing heavy is imported: command lines are checked here."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from lorapre_dist.config import ConfigError

LOCAL_SUFFIXES = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
MAGIC = "*?["
# What ``datasets`` and the hub put beside data.
DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def kind_of(path: Path) -> str | None:
    """``"text"``, ``"json"``, ``"parquet"`` or ``"csv"``, also of a compressed file; ``None`` for an unknown kind."""
    suffix = path.suffix if path.suffix not in COMPRESSIONS else path.with_suffix("").suffix
    return LOCAL_SUFFIXES.get(suffix)


def is_local(name: str) -> bool:
    """Whether ``name`` means something on this machine: what is there goes before what it could be a glob for."""
    return "://" not in name and (os.path.exists(name) or any(c in name for c in MAGIC))


def is_saved(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote the folder."""
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def is_hub_form(path: Path) -> bool:
    """Whether the folder says itself what its splits are: a dataset card, or what came before those."""
    card = path / "README.md"
    if card.is_file() and card.read_bytes().removeprefix(b"\xef\xbb\xbf").startswith(b"---"):
        return True
    return (path / "dataset_infos.json").is_file()


def local_files(name: str, option: str = "--dataset") -> list[Path]:
    """The data files that ``name`` (file, folder or glob) means, sorted; all of one kind.

    Folders are searched through, links to folders too, each folder once. Hidden files and folders (``.git``,
    ``.ipynb_checkpoints``) are left out unless ``name`` names them, and so are descriptions of data sets.

    Raises:
        ConfigError: no data file, several kinds, a folder that cannot be read, a link to nothing.
    """
    found: dict[str, Path] = {}
    for file in _meant(name, option):
        if file.is_file() and kind_of(file):
            found.setdefault(os.path.join(os.path.realpath(file.parent), file.name), file)
    files = sorted(found.values())
    if len({kind_of(f) for f in files}) > 1 and {f.name for f in files if kind_of(f) == "text"} == {"README.md"}:
        files = [f for f in files if f.name != "README.md"]
    if not files:
        if not os.path.exists(name) and not glob.glob(name):
            raise ConfigError(f"{option} {name}: no file matches")
        raise ConfigError(f"{option} {name}: holds no {', '.join(LOCAL_SUFFIXES)} file")
    kinds = {kind_of(f) or "": f for f in reversed(files)}
    if len(kinds) > 1:
        examples = " and ".join(f"{kind} ({file.name})" for kind, file in sorted(kinds.items()))
        raise ConfigError(f"{option} {name}: mixes {examples} files; name one kind with a glob")
    return files


def _meant(name: str, option: str) -> Iterator[Path]:
    """Every file that the name or glob means. Folders before a glob that are there are names, whatever is in them."""
    seen: set[str] = set()
    parts = Path(name).parts
    there = next((k for k in range(len(parts), 0, -1) if os.path.exists(os.path.join(*parts[:k]))), 0)
    # ``glob`` would follow links that lead back for ever.
    deep = parts.index("**", there) if "**" in parts[there:] else len(parts)
    base = glob.escape(os.path.join(*parts[:there])) if there else ""
    starts = glob.glob(os.path.join(base, *parts[there:deep])) if deep else ["."]
    for start in sorted(map(Path, starts)):
        if not start.is_dir():
            yield start
            continue
        for file in _files_in(start, option, seen):
            if deep == len(parts) or _matches(file.relative_to(start).parts, parts[deep:]):
                yield file


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the glob ``pattern`` matches all of ``parts``; ``**`` stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return pattern == ("**",) or any(_matches(parts[k:], pattern[1:]) for k in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _files_in(folder: Path, option: str, seen: set[str]) -> Iterator[Path]:
    """Data files anywhere in ``folder``; ``seen`` has the folders that were searched."""

    def refuse(error: OSError) -> NoReturn:
        raise ConfigError(f"{option} {error.filename}: cannot be read: {error.strerror}") from error

    starts = [str(folder)]
    for start in starts:  # what links lead to comes last, and so by its own name if it has one here
        for place, folders, files in os.walk(start, onerror=refuse):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
            yield from _data_files(place, files, option)


def _data_files(place: str, names: list[str], option: str) -> Iterator[Path]:
    for file in sorted(Path(place, name) for name in names):
        if file.name.startswith(".") or file.name in DESCRIPTIONS or not kind_of(file):
            continue
        if not file.exists():
            raise ConfigError(f"{option} {file}: is a link to {os.readlink(file)}, where nothing is")
        yield file
