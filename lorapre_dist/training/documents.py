"""Sources of text: built in, local files, or the Hugging Face hub; all as streams of documents."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError
from lorapre_dist.training import builtin_text
from lorapre_dist.training.reading import ATTEMPTS, Reader, first_line, private
from lorapre_dist.training.settings import BUILTIN, COMPRESSIONS, LOCAL_SUFFIXES

# Short names of hub datasets, and what needs a configuration: (repository, configuration).
HUB_ALIASES: dict[str, tuple[str, str | None]] = {
    "c4": ("allenai/c4", "en"),
    "metamath": ("meta-math/MetaMathQA", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "openai/gsm8k": ("openai/gsm8k", "main"),
    "math500": ("HuggingFaceH4/MATH-500", None),
}

# Rows read at a time.
PULL_ROWS = 32
# Of a large file only this much at each end goes into its fingerprint.
EDGE_BYTES = 2**20


@dataclass(frozen=True)
class Source:
    """A corpus that can be read again and again in one order.

    Attributes:
        name: what the user called it.
        fingerprint: changes when the documents change; part of cache keys and checked on resume.
        documents: starts a new pass over the texts.
        stream: the ``datasets.IterableDataset`` behind it, ``None`` for built-in text (see :func:`stream_of`).
        column: the stream's text column.
        finite: small enough to be tokenised as a whole; otherwise it is tokenised while training.
        hub: a hub dataset, which may have splits.
        attempts: how often a failing read is tried.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[str]]
    stream: Any = None
    column: str = "text"
    finite: bool = True
    hub: bool = False
    attempts: int = ATTEMPTS


def open_source(
    name: str, *, config: str | None, split: str, column: str | None, streaming: bool, attempts: int = ATTEMPTS
) -> Source:
    """The corpus called ``name``: ``"builtin"``, a local file, folder or glob, the URL of files, or a hub dataset.

    Raises:
        ConfigError: nothing there, an unknown kind of file, no such configuration, split or column.
    """
    if name == BUILTIN:
        return Source(name, builtin_text.fingerprint(), builtin_text.documents)
    stream, facts, where = open_rows(name, config, split)
    finite, hub = where == "local" and not streaming, where == "hub"
    return _stream_source(name, facts, stream, column, attempts, finite=finite, hub=hub)


def open_rows(name: str, config: str | None, split: str, option: str = "--dataset") -> tuple[Any, str, str]:
    """The rows of a local file, folder or glob, of the URL of files, or of a hub dataset.

    Returns:
        A ``datasets.IterableDataset``, facts that change when the rows do, and ``"local"``, ``"url"`` or ``"hub"``.

    Raises:
        ConfigError: nothing there, an unknown kind of file, no such configuration or split; names ``option``.
    """
    if "://" in name:
        return _url_rows(name, option)
    if Path(name).exists() or any(c in name for c in "*?["):
        files = local_files(name, option)
        if files:
            return _local_rows(name, files, option)
    repository, default = HUB_ALIASES.get(name, (name, None))
    stream = _load(name, option, repository, config or default, split=split)
    return stream, json.dumps([repository, config or default, split]), "hub"


def stream_of(source: Source) -> Any:
    """The ``datasets.IterableDataset`` of any corpus, also of built-in text."""
    if source.stream is not None:
        return source.stream
    import datasets

    return datasets.IterableDataset.from_generator(_builtin_rows)


def _builtin_rows() -> Iterator[dict[str, str]]:
    return ({"text": text} for text in builtin_text.documents())


def local_files(name: str, option: str = "--dataset") -> list[Path]:
    """The data files that ``name`` (file, folder or glob) means, sorted; all of one kind.

    A folder with a dataset card (``README.md`` and no other text) is read as the hub would; then the list is empty.

    Raises:
        ConfigError: no data file, or several kinds.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "README.md").is_file() and (path / "README.md").read_text(encoding="utf-8").startswith("---"):
            return []
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
    else:
        found = sorted(Path(p) for p in (glob.glob(name, recursive=True) if not path.is_file() else [name]))
        found = [p for p in found if p.is_file() and kind_of(p)]
    if not found:
        raise ConfigError(f"{option} {name}: holds no {', '.join(LOCAL_SUFFIXES)} file")
    kinds = sorted({kind_of(p) or "" for p in found})
    if len(kinds) > 1:
        raise ConfigError(f"{option} {name}: mixes {' and '.join(kinds)} files; name one kind with a glob")
    return found


def kind_of(path: Path) -> str | None:
    """Which ``datasets`` builder reads the file, ``None`` for an unknown kind."""
    suffix = path.suffix if path.suffix not in COMPRESSIONS else path.with_suffix("").suffix
    return LOCAL_SUFFIXES.get(suffix)


def _local_rows(name: str, files: list[Path], option: str) -> tuple[Any, str, str]:
    if not any(f.stat().st_size for f in files):
        raise ConfigError(f"{option} {name}: is empty")
    kind = kind_of(files[0]) or ""
    stream = _load(name, option, kind, data_files=[str(f) for f in files], split="train", **_options(kind))
    return stream, json.dumps([kind, [file_facts(f) for f in files]]), "local"


def _url_rows(name: str, option: str) -> tuple[Any, str, str]:
    kind = kind_of(Path(name))
    if kind is None:
        raise ConfigError(f"{option} {name}: unknown kind of file; known: {', '.join(LOCAL_SUFFIXES)}")
    stream = _load(name, option, kind, data_files=name, split="train", **_options(kind))
    return stream, json.dumps([kind, name]), "url"


def _options(kind: str) -> dict[str, Any]:
    # Paragraphs: one document per blank-line separated block of a text file.
    return {"sample_by": "paragraph"} if kind == "text" else {}


def file_facts(path: Path) -> list[Any]:
    """Name, size and a hash of the first and last megabyte: the same for copies on several machines."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return [path.name, size, digest.hexdigest()]


def _load(name: str, option: str, *args: Any, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    # It logs what it also raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(*args, streaming=True, **options)
    except Exception as error:  # datasets raises many kinds, from network errors to bare Exception
        raise ConfigError(f"{option} {name}: cannot be opened: {first_line(error)}") from error


def _stream_source(
    name: str, facts: str, stream: Any, column: str | None, attempts: int, *, finite: bool, hub: bool = False
) -> Source:
    column = _text_column(name, stream, column, attempts)
    digest = hashlib.blake2b(f"{facts}:{column}".encode(), digest_size=8).hexdigest()

    def documents() -> Iterator[str]:
        reader = Reader(name, private(stream), attempts)
        while not reader.ended:
            yield from texts(name, column, reader.read(PULL_ROWS))

    return Source(name, digest, documents, stream, column, finite, hub, attempts)


def texts(name: str, column: str, rows: list[dict[str, Any]]) -> list[str]:
    """The documents in ``rows``; empty ones are left out.

    Raises:
        ConfigError: something there is no text.
    """
    found = [row[column] for row in rows]
    for text in found:
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"--dataset {name}: column {column!r} holds {type(text).__name__}, not text")
    return [text for text in found if text]


def _text_column(name: str, stream: Any, column: str | None, attempts: int) -> str:
    rows = Reader(name, private(stream), attempts).read(1)
    if not rows:
        raise ConfigError(f"--dataset {name}: is empty")
    first = rows[0]
    strings = [key for key, value in first.items() if isinstance(value, str)]
    if column is not None:
        if column not in first:
            raise ConfigError(f"--text_column {column}: {name} has the columns {', '.join(first)}")
        return column
    if "text" in first:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise ConfigError(f"--dataset {name}: name one of its columns with --text_column: {', '.join(first)}")
