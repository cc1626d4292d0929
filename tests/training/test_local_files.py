"""Folders and files as people have them: parts that differ, links, names like globs, marks and broken rows."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data import reading
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.documents import open_rows
from lorapre_dist.training.data.local_files import local_files
from lorapre_dist.training.data.reading import Reader, private
from lorapre_dist.training.data.sequences import evaluation_source, prepare_data
from lorapre_dist.training.data.streaming import ShardStream
from lorapre_dist.training.run.settings import check_source
from tests.training.conftest import documents, source_of


def texts_of(path: Path | str, **options) -> list[str]:
    check_source("--dataset", str(path))
    return list(source_of(path, **options).documents())


def write(path: Path, rows: list[dict] | None) -> None:
    """``rows`` in the form that the file's name says; None is a file of no bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows is None:
        path.touch()
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string())}), path)
    elif path.suffix == ".csv":
        path.write_text(
            "".join(",".join(map(str, line)) + "\n" for line in [rows[0].keys(), *(r.values() for r in rows)])
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- parts that differ


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_text_column_has_to_be_alike(tmp_path, kind, streaming):
    nested = {} if kind == "csv" else {"meta": {"a": 1}}
    other = {} if kind == "csv" else {"meta": {"b": "x", "c": [1]}}
    parts = [
        [{"text": "one", "score": 1, **nested}],
        None,  # a part that got nothing
        [{"text": "two", "score": 0.5, "more": "column", **other}],
        [{"source": "elsewhere", "text": "three", "score": "high"}, {"source": "e", "text": "NA", "score": "1"}],
        [{"text": "four"}],
    ]
    for number, rows in enumerate(parts):
        write(tmp_path / f"part{number}.{kind}", rows)
    if kind == "parquet":
        write(tmp_path / "part5.parquet", [])
    if kind == "csv":
        (tmp_path / "part5.csv").write_text("text,score\n")
    assert texts_of(tmp_path, streaming=streaming) == ["one", "two", "three", "NA", "four"]


def test_fine_tuning_reads_its_two_columns_alone(tmp_path):
    write(tmp_path / "a.jsonl", [{"query": "q1", "response": "r1", "type": "GSM"}])
    write(tmp_path / "b.jsonl", [{"query": "q2", "response": "r2", "type": {"of": 3}, "more": [1]}])
    rows = open_rows(str(tmp_path), None, "train")
    both = Reader("x", private(rows.only(("query", "response")))).read(10)
    assert both == [{"query": "q1", "response": "r1"}, {"query": "q2", "response": "r2"}]


def test_one_column_may_change_its_type_within_a_file(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "one", "x": 1}, {"text": "two", "x": "1"}, {"text": "three", "x": {"y": []}}])
    assert texts_of(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("b.jsonl", b'{"text": "x"}\n{"text": \n', "b.jsonl: line 2 is not JSON: Expecting value at character 11"),
        ("b.jsonl", b'{"text": 3}\n', "b.jsonl: row 1: column 'text' holds int, not text"),
        ("b.jsonl", b'{"content": "x"}\n', "b.jsonl: has no column 'text'; it has content"),
        ("b.jsonl", b"[1, 2]\n", "b.jsonl: holds 1 where an object belongs"),
        ("b.jsonl", b'{"text": "\xff"}\n', "b.jsonl: UnicodeDecodeError"),
        ("b.jsonl", b"[" * 100_000, "b.jsonl: "),
        ("b.jsonl", b'{\n"text": "a"\n', "b.jsonl: is not JSON"),
        ("b.csv", b"text,n\nx,1\ny,2,3\n", "b.csv: line 3 has 3 fields, the header 2"),
        ("b.csv", b'text,n\n"x,1\n', "b.csv: line 2: unexpected end of data"),
        ("b.csv", b"body,n\nx,1\n", "b.csv: has no column 'text'; it has body, n"),
        ("b.txt", b"\xff\xfe\x00", "b.txt: UnicodeDecodeError"),
        ("b.parquet", b"PAR1 is how it begins", "b.parquet: ArrowInvalid"),
        ("b.jsonl.gz", b"no gzip", "b.jsonl.gz: BadGzipFile"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "b.jsonl.gz: EOFError"),
        ("b.jsonl.xz", b"no xz", "b.jsonl.xz: LZMAError"),
        ("b.jsonl.zst", b"no zst", "b.jsonl.zst: OSError: ZSTD"),
    ],
)
def test_every_error_names_the_file(tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.001)
    suffix = name.split(".", 1)[1].removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")
    write(tmp_path / f"a.{suffix}", [{"text": "whole"}])
    (tmp_path / name).write_bytes(content)
    write(tmp_path / f"c.{suffix}", [{"text": "whole"}])
    with pytest.raises(ConfigError, match=f"cannot be read.*: {tmp_path}/{words.replace('(', '.')}") as caught:
        texts_of(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# --- forms


def test_a_file_that_holds_rows_elsewhere_is_not_one_document(tmp_path):
    """As SQuAD's: the version would be the only text."""
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"version": "1", "data": [{"title": "a", "context": "b"}]}))
    with pytest.raises(ConfigError, match="--text_column: version, data; if the rows are the objects in 'data'"):
        texts_of(path)
    with pytest.raises(ConfigError, match=r"train.json: row 1: column 'data' holds list"):
        texts_of(path, column="data")


@pytest.mark.parametrize("indent", [None, 1])
def test_json_files_may_be_lists_objects_or_strings(tmp_path, indent):
    rows = [{"text": "one", "n": 1}, {"text": "two"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=indent))
    (tmp_path / "objects.json").write_text("\n".join(json.dumps(row, indent=indent) for row in rows) + "\n\n")
    (tmp_path / "strings.json").write_text(json.dumps(["one", "two"], indent=indent))
    (tmp_path / "lines.jsonl").write_text('\n{"text": "one\\u2028\\r"}\n\n"two"')
    for path in sorted(tmp_path.iterdir()):
        assert [text.strip() for text in texts_of(path)] == ["one", "two"], path


def test_a_mark_before_the_text_is_dropped_and_half_characters_replaced(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "one \\ud83d"}\n')
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "\\ud83d\\ude00"}\n')  # not the first file alone
    (tmp_path / "c.txt").write_bytes(mark + b"one")
    (tmp_path / "d.csv").write_bytes(mark + b"text,n\none,1\n")
    (tmp_path / "e.json").write_bytes(mark + b'["one"]')
    assert texts_of(tmp_path / "*.jsonl") == ["one \ufffd", "\U0001f600"]
    for name in ("c.txt", "d.csv", "e.json"):
        assert texts_of(tmp_path / name) == ["one"], name


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.skipif(
    importlib.util.find_spec("zstandard") is not None,
    reason="zstandard is installed: nothing is missing that could be named",
)
def test_the_package_that_a_hub_dataset_needs_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "train.jsonl.zst").write_bytes(zstd(b'{"text": "one"}\n'))
    with pytest.raises(ConfigError, match=r"zstd not supported; .* pip install zstandard"):
        texts_of(tmp_path)


def test_every_compression_is_read_in_members_too(tmp_path):
    parts = [b'{"text": "one"}\n', b'{"text": "two"}\n']
    for suffix, compress in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}.items():
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(b"".join(map(compress, parts)))
        assert texts_of(path) == ["one", "two"], suffix
        assert texts_of(f"file://{path}") == ["one", "two"], suffix


def test_long_and_quoted_fields_of_csv(tmp_path):
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'id,body,ok\n7,"{long}",True\n8,"two ""lines"",\nhere",False\n')
    assert texts_of(tmp_path / "a.csv") == [long, 'two "lines",\nhere']


# --- folders


def test_links_are_followed_once_and_what_is_hidden_is_left_out(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write(data / "a.jsonl", [{"text": "a"}])
    write(data / "sub" / "b.jsonl", [{"text": "b"}])
    write(elsewhere / "c.jsonl", [{"text": "c"}])
    for hidden in (".ipynb_checkpoints/a.jsonl", "sub/.cache/x.jsonl", ".b.jsonl", "sub/._b.jsonl"):
        write(data / hidden, [{"text": "hidden"}])
    (data / "link").symlink_to(elsewhere)
    (data / "file.jsonl").symlink_to(elsewhere / "c.jsonl")
    (data / "sub" / "up").symlink_to(data)
    (elsewhere / "back").symlink_to(data / "sub")
    for name in (data, f"{data}/*", f"{data}/**", f"{data}/**/*.jsonl", f"{data}/**/**/*.js*"):
        assert sorted(texts_of(name)) == ["a", "b", "c", "c"], name
    assert texts_of(f"{data}/**/link/*.jsonl") == ["c"] and texts_of(f"{tmp_path}/**/sub/*") == ["b"]
    assert texts_of(data / ".ipynb_checkpoints") == ["hidden"]
    (data / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"gone.jsonl: is a link to .*nowhere, where nothing is"):
        texts_of(data)


@pytest.mark.parametrize("folder, file", [("br[2]", "a.jsonl"), ("x", "part[1].jsonl"), ("a*b", "what?.jsonl")])
def test_what_is_there_is_a_name_before_it_is_a_glob(tmp_path, folder, file):
    write(tmp_path / folder / file, [{"text": "meant"}])
    write(tmp_path / "br2" / "a.jsonl", [{"text": "not meant"}])
    write(tmp_path / "x" / "part1.jsonl", [{"text": "not meant"}])
    assert texts_of(tmp_path / folder / file) == ["meant"]
    if folder != "x":
        assert texts_of(tmp_path / folder) == ["meant"]
        assert texts_of(tmp_path / folder / "*.jsonl") == ["meant"]
    assert texts_of(tmp_path / "br[12]" / "*.jsonl") == ["not meant"]


@pytest.mark.parametrize("card", ["README.md", "dataset_infos.json"])
def test_a_clone_of_a_hub_repository_is_read_by_its_splits(tmp_path, card):
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", [{"text": "train"}])
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", [{"text": "test"}])
    (tmp_path / card).write_text("---\nlicense: mit\n---\n" if card == "README.md" else '{"default": {}}')
    assert texts_of(tmp_path) == ["train"]
    assert texts_of(tmp_path, split="test") == ["test"]


def test_descriptions_beside_data_are_no_data(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "config.json").write_text('{"text": "not this"}')
    (tmp_path / "README.md").write_text("How it was made")
    assert texts_of(tmp_path) == ["a"]


def test_folders_of_save_to_disk(tmp_path, make_settings):
    texts = documents(60)
    rows = Dataset.from_dict({"text": texts, "n": range(60)})
    rows.save_to_disk(str(tmp_path / "one[1]"), num_shards=3)
    held_out = Dataset.from_dict({"text": [f"held out {i} " * 9 for i in range(20)]})
    DatasetDict({"train": rows, "validation": held_out}).save_to_disk(str(tmp_path / "splits"))
    assert texts_of(tmp_path / "one[1]") == texts
    assert texts_of(tmp_path / "splits") == texts
    with pytest.raises(ConfigError, match="splits: has no split 'test', only train, validation"):
        source_of(tmp_path / "splits", split="test")
    options = ["--dataset", str(tmp_path / "splits"), "--seq_len", "8", "--vocab_size", "300"]
    settings = make_settings(*options)
    evaluation = evaluation_source(settings, source_of(tmp_path / "splits"))
    assert evaluation is not None and list(evaluation.documents()) == list(held_out["text"])
    assert prepare_data(settings, BatchPlan(4, 2, 1, 0), 300).train.next_batch().shape == (4, 8)
    options = ["--dataset", str(tmp_path / "one[1]"), "--streaming", *options[2:], "--eval_batches", "1"]
    stream = prepare_data(make_settings(*options), BatchPlan(4, 2, 1, 0), 300).train
    assert isinstance(stream, ShardStream) and stream.shards == 3


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}.jsonl", "x\0y.jsonl", "a/" * 3000 + "b.jsonl"])
def test_names_that_no_file_can_have_are_one_line(name, monkeypatch):
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("no such data"))
    )
    with pytest.raises(ConfigError, match=r"no such (file or folder|data)"):
        texts_of(name)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "closed").mkdir()

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    with pytest.raises(ConfigError, match="closed: cannot be read: Permission denied"):
        local_files(str(tmp_path))
