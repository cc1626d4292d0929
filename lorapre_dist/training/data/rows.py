"""Rows of text, JSON, CSV and Parquet files, of the columns that are asked for alone.

``datasets`` has builders for these files, which take the first file's columns for every file's: where any other column
differs they cannot read on, and do not say in which file. Here each file is read by itself, what is no text column may
hold anything, and every error names the file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import IO, Any

from lorapre_dist.training.data.reading import FileError, first_line

Row = dict[str, Any]
# Rows of a Parquet file, and characters of a text file, that are decoded at a time.
BATCH_ROWS = 256
CHUNK = 2**20


class _Malformed(ValueError):
    """What is wrong with a file, in words of our own."""


def read_rows(files: list[str], kind: str, columns: tuple[str, ...] | None) -> Iterator[Row]:
    """Every row of ``files`` (paths or URLs), one file after the other; a generator for ``datasets`` to shard by file.

    Args:
        kind: ``"text"``, ``"json"``, ``"csv"`` or ``"parquet"``.
        columns: of each row, text or None; ``None`` for all of them, as they are.

    Raises:
        FileError: a file cannot be read, is not of its kind, or lacks a column.
    """
    for file in files:
        try:
            with _raw(file) as raw, _decoded(file, raw) as stream:
                rows = _READERS[kind](stream, columns)
                yield from rows if columns is None else _chosen(rows, columns)
        except Exception as error:  # of the file system, the network, and of every decoder
            what = str(error) if isinstance(error, _Malformed) else first_line(error)
            raise FileError(f"{file}: {what}") from error


def _chosen(rows: Iterator[Row], columns: tuple[str, ...]) -> Iterator[Row]:
    there: set[str] = set()
    for number, row in enumerate(rows, 1):
        there.update(row)
        chosen = {column: row.get(column) for column in columns}
        for column, value in chosen.items():
            if value is not None and not isinstance(value, str):
                raise _Malformed(f"row {number}: column {column!r} holds {type(value).__name__}, not text")
            chosen[column] = value and _valid(value)
        yield chosen
    missing = [column for column in columns if there and column not in there]
    if missing:
        raise _Malformed(f"has no column {missing[0]!r}; it has {', '.join(sorted(there))}")


def _valid(text: str) -> str:
    """Without halves of surrogate pairs, which JSON's escapes can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# opening --------------------------------------------------------------------------------------------------------------


def _raw(file: str) -> IO[bytes]:
    if "://" not in file:
        return open(file, "rb")
    from datasets.utils.file_utils import xopen  # fsspec's open, which opens a connection that breaks again

    return xopen(file, "rb")


def _decoded(file: str, raw: IO[bytes]) -> Any:
    decoder = next((decoder for suffix, decoder in _DECODERS.items() if file.endswith(suffix)), None)
    return nullcontext(raw) if decoder is None else decoder(raw)


def _zstd(stream: IO[bytes]) -> Any:
    import pyarrow as pa  # which ``datasets`` brings

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


_DECODERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def _characters(stream: IO[bytes], newline: str | None) -> io.TextIOWrapper:
    """UTF-8, without the mark that some programs put before it."""
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


# kinds ----------------------------------------------------------------------------------------------------------------


def _text(stream: IO[bytes], _: Any) -> Iterator[Row]:
    """A row for each block between blank lines."""
    characters, rest = _characters(stream, None), ""
    while chunk := characters.read(max(CHUNK, len(rest))):
        *blocks, rest = (rest + chunk).split("\n\n")
        yield from ({"text": block} for block in blocks if block)
    if rest:
        yield {"text": rest}


def _json(stream: IO[bytes], _: Any) -> Iterator[Row]:
    """Objects one a line, or a list of them, or any number one after the other; a string is a row of text."""
    for value in _json_values(_characters(stream, "\n")):
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, (dict, str)):
                raise _Malformed(f"holds {json.dumps(row)[:40]} where an object belongs")
            yield {"text": row} if isinstance(row, str) else row


def _json_values(characters: io.TextIOWrapper) -> Iterator[Any]:
    begun = False
    for number, line in enumerate(characters, 1):
        if line.isspace():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            # A value that goes on behind the end of its line: the file has not one a line.
            if not begun and error.pos >= len(line.rstrip()):
                yield from _json_stretched(line + characters.read())
                return
            raise _Malformed(f"line {number} is not JSON: {error.msg} at character {error.pos + 1}") from error
        except RecursionError:
            raise _Malformed(f"line {number} is nested too deeply") from None
        begun = True


def _json_stretched(text: str) -> Iterator[Any]:
    decoder, space, at = json.JSONDecoder(), re.compile(r"\s*"), 0
    while (at := space.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # it always matches
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _Malformed(f"is not JSON: {error}") from error
        except RecursionError:
            raise _Malformed("is nested too deeply") from None
        yield value


def _csv(stream: IO[bytes], columns: tuple[str, ...] | None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # else a document may have 128 KiB
    lines = csv.reader(_characters(stream, ""), strict=True)
    try:
        header = next(lines, [])
        for fields in lines:
            if len(fields) > len(header):
                raise _Malformed(f"line {lines.line_num} has {len(fields)} fields, the header {len(header)}")
            if fields:
                values = fields if columns is not None else map(_plain, fields)
                yield dict(zip(header, values, strict=False))
    except csv.Error as error:
        raise _Malformed(f"line {lines.line_num}: {error}") from error


def _plain(field: str) -> Any:
    """A field of a CSV file that is no text as what it is."""
    try:
        return float(field)
    except ValueError:
        return {"": None, "true": True, "false": False}.get(field.lower(), field)


def _parquet(stream: Any, columns: tuple[str, ...] | None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    if not stream.seek(0, io.SEEK_END):
        return
    file = pq.ParquetFile(stream)
    there = file.schema_arrow.names
    chosen = [name for name in there if columns is None or name in columns]
    if file.metadata.num_rows and not chosen:
        raise _Malformed(f"has no column {(columns or ('',))[0]!r}; it has {', '.join(there)}")
    for batch in file.iter_batches(BATCH_ROWS, columns=chosen, use_threads=False):
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Any, Any], Iterator[Row]]] = {
    "text": _text,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}
