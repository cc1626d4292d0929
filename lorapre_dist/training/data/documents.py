"""Sources of text: built in, local files, or the Hugging Face hub; all as streams of documents."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data import builtin_text
from lorapre_dist.training.data.local_files import LOCAL_SUFFIXES, is_hub_form, is_local, is_saved, kind_of, local_files
from lorapre_dist.training.data.reading import ATTEMPTS, Reader, first_line, private
from lorapre_dist.training.data.rows import read_rows
from lorapre_dist.training.run.ranks import saying
from lorapre_dist.training.run.settings import BUILTIN

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
    rows = open_rows(name, config, split)
    column = _text_column(name, rows.stream, column, attempts)
    digest = hashlib.blake2b(f"{rows.facts}:{column}".encode(), digest_size=8).hexdigest()
    stream = rows.only((column,))

    def documents() -> Iterator[str]:
        reader = Reader(name, private(stream), attempts)
        while not reader.ended:
            yield from texts(name, column, reader.read(PULL_ROWS))

    return Source(name, digest, documents, stream, column, rows.local and not streaming, rows.splits, attempts)


@dataclass(frozen=True)
class Rows:
    """What a name stands for, as a ``datasets.IterableDataset``.

    Attributes:
        stream: with every column.
        facts: change when the rows do.
        only: the stream of some columns alone, which are text.
        local: on this machine, and neither a stream of the hub's nor of a URL's.
        splits: it has named splits.
    """

    stream: Any
    facts: str
    only: Callable[[tuple[str, ...]], Any]
    local: bool = False
    splits: bool = False


def open_rows(name: str, config: str | None, split: str, option: str = "--dataset") -> Rows:
    """The rows of a local file, folder or glob, of the URL of files, or of a hub dataset.

    A folder with a dataset card is read as the hub would, one of ``save_to_disk`` by ``load_from_disk``.

    Raises:
        ConfigError: nothing there, an unknown kind of file, no such configuration or split; names ``option``.
    """
    path = Path(name)
    folder = os.path.isdir(name)  # unlike Path's, also asked about names that are too long for one
    if "://" in name:
        return _url_rows(name, option)
    if folder and is_saved(path):
        return _saved_rows(path, split, option)
    if is_local(name) and not (folder and is_hub_form(path)):
        return _local_rows(name, option)
    repository, default = HUB_ALIASES.get(name, (name, None))
    datasets = _datasets()
    with _refusing(option, name), saying(f"for the hub: dataset {repository}"):
        stream = datasets.load_dataset(repository, config or default, split=split, streaming=True)
    return Rows(stream, json.dumps([repository, config or default, split]), lambda _: stream, splits=True)


def stream_of(source: Source) -> Any:
    """The ``datasets.IterableDataset`` of any corpus, also of built-in text."""
    if source.stream is not None:
        return source.stream
    import datasets

    return datasets.IterableDataset.from_generator(_builtin_rows)


def _builtin_rows() -> Iterator[dict[str, str]]:
    return ({"text": text} for text in builtin_text.documents())


def _local_rows(name: str, option: str) -> Rows:
    files = local_files(name, option)
    if not any(f.stat().st_size for f in files):
        raise ConfigError(f"{option} {name}: is empty")
    kind = kind_of(files[0]) or ""
    facts = json.dumps([kind, [file_facts(f) for f in files]])
    return _file_rows([str(f) for f in files], kind, facts, local=True)


def _url_rows(name: str, option: str) -> Rows:
    kind = kind_of(Path(name))
    if kind is None:
        raise ConfigError(f"{option} {name}: unknown kind of file; known: {', '.join(LOCAL_SUFFIXES)}")
    datasets = _datasets()
    with _refusing(option, name):
        files = datasets.data_files.resolve_pattern(name, base_path="")
    return _file_rows([str(file) for file in files], kind, json.dumps([kind, name]))


def _file_rows(files: list[str], kind: str, facts: str, local: bool = False) -> Rows:
    def stream(columns: tuple[str, ...] | None) -> Any:
        options = {"files": files, "kind": kind, "columns": columns}
        return _datasets().IterableDataset.from_generator(read_rows, gen_kwargs=options)

    return Rows(stream(None), facts, stream, local)


def _saved_rows(path: Path, split: str, option: str) -> Rows:
    datasets = _datasets()
    with _refusing(option, str(path)):
        saved = datasets.load_from_disk(str(path))
    splits = isinstance(saved, datasets.DatasetDict)
    if splits and split not in saved:
        raise ConfigError(f"{option} {path}: has no split {split!r}, only {', '.join(saved)}")
    table = (saved[split] if splits else saved).with_format(None)
    files = [Path(file["filename"]) for file in table.cache_files]

    def stream(columns: tuple[str, ...] | None) -> Any:
        chosen = table if columns is None else table.select_columns(list(columns))
        return chosen.to_iterable_dataset(num_shards=max(1, min(len(files), len(chosen))))

    return Rows(stream(None), json.dumps(["arrow", [file_facts(f) for f in files]]), stream, True, splits)


def _datasets() -> Any:
    """The library, silent: it logs what it also raises."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


@contextmanager
def _refusing(option: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets raises many kinds, from network errors to bare Exception
        raise ConfigError(f"{option} {name}: cannot be opened: {first_line(error)}{_missing_decoder(error)}") from error


def _missing_decoder(error: BaseException) -> str:
    """What to install, where ``datasets`` could not decode a hub's ``.zst`` files."""
    missing = "zst" in str(error).lower() and importlib.util.find_spec("zstandard") is None
    return "; the package zstandard decodes it: pip install zstandard" if missing else ""


def file_facts(path: Path) -> list[Any]:
    """Name, size and a hash of the first and last megabyte: the same for copies on several machines."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return [path.name, size, digest.hexdigest()]


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
    # A text beside a list of objects may be the version of a file whose rows are in the list.
    inner = next((k for k, v in first.items() if isinstance(v, list) and v and isinstance(v[0], dict)), None)
    if len(strings) == 1 and inner is None:
        return strings[0]
    hint = "" if inner is None else f"; if the rows are the objects in {inner!r}, write those to a file, one a line"
    raise ConfigError(f"--dataset {name}: name one of its columns with --text_column: {', '.join(first)}{hint}")
