"""``lorapre tokenize``: what it writes, that nothing interrupts it for good, and training from it."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lorapre_dist.cli import main
from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.sequences import prepare_data
from lorapre_dist.training.data.token_parts import token_type
from lorapre_dist.training.data.tokenized import TokenFiles, TokenFolder
from lorapre_dist.training.data.tokenizer import Encoder, load_tokenizer, train_bpe
from tests.launch.conftest import group_members
from tests.training.conftest import documents, hub_folder

SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(documents(200), 400).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three compressed shards of 500, 6000 and 100 documents."""
    folder, texts = tmp_path_factory.mktemp("corpus"), documents(6600, 12)
    for shard, part in enumerate((texts[:500], texts[500:6500], texts[6500:])):
        with gzip.open(folder / f"part-{shard}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    return folder, texts


def command(corpus, tokenizer, out, *options):
    given = ["--dataset", str(corpus[0]), "--tokenizer", tokenizer, "--eval_fraction", "0.1", "--part_tokens", "4000"]
    return ["tokenize", *given, "--no_progress", str(out), *options]


@pytest.fixture(scope="module")
def tokenised(corpus, tokenizer, tmp_path_factory):
    """The corpus, written in one go by one process."""
    out = tmp_path_factory.mktemp("out") / "tokens"
    assert main(command(corpus, tokenizer, out)) == 0
    return out


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_document_is_there_once_in_order(tokenised, corpus, tokenizer):
    encode = Encoder(load_tokenizer(tokenizer))
    folder = TokenFolder.open(tokenised)
    end = folder.content["end_of_text"]
    found = {}
    for part in ("train", "held_out"):
        tokens = folder.tokens(part)[:]
        assert tokens.dtype == np.uint16
        ends = np.flatnonzero(tokens == end)
        found[part] = [piece.tolist() for piece in np.split(tokens, ends + 1)[:-1]]
        assert ends[-1] == len(tokens) - 1
        assert folder.content[part] == {"tokens": len(tokens), "documents": len(found[part])}
    held_out = {tuple(ids) for ids in found["held_out"]}
    expected = encode(corpus[1])
    assert found["train"] == [ids for ids in expected if tuple(ids) not in held_out]
    assert found["held_out"] == [ids for ids in expected if tuple(ids) in held_out]
    assert 540 < len(held_out) < 780  # 10% of 6600, +- 4.9 standard deviations
    assert len(list(tokenised.glob("train-00001-*.bin"))) > 3
    assert not (tokenised / ".work").exists()


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_writes_the_same_bytes(tokenised, corpus, tokenizer, tmp_path):
    """Two processes, of which the first is killed with SIGKILL after some parts; one process finishes them."""
    out = tmp_path / "tokens"
    options = command(corpus, tokenizer, out, "--workers", "2")
    arguments = [sys.executable, "-m", "lorapre_dist", *options]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    notes, end = out / ".work", time.monotonic() + 240
    while len(list(notes.glob("train-*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Its own processes see that it is gone.
    while group_members(process.pid):
        assert time.monotonic() < end
        time.sleep(0.05)
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("train-*.bin")}
    noted = {json.loads(p.read_text())["train"]["name"] for p in notes.glob("train-*.json")}
    assert len(noted) >= 2
    assert len(noted) < len(list(tokenised.glob("train-*.bin")))
    with pytest.raises(ConfigError, match="unfinished"):
        TokenFolder.open(out)

    assert main(command(corpus, tokenizer, out)) == 0
    assert content(out) == content(tokenised)
    assert all((out / name).stat().st_mtime_ns == done[name] for name in noted)


def test_what_is_finished_is_left_alone_and_another_job_is_refused(tokenised, corpus, tokenizer, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in tokenised.rglob("*") if p.is_file()}
    assert main(command(corpus, tokenizer, tokenised)) == 0
    assert {p: p.stat().st_mtime_ns for p in tokenised.rglob("*") if p.is_file()} == before
    assert main(command(corpus, tokenizer, tokenised, "--part_tokens", "5000")) == 2
    assert "was begun with another part_tokens (4000, now 5000)" in capsys.readouterr().err
    train_bpe(documents(50), 300).save_pretrained(str(tmp_path / "other"))
    assert main(command(corpus, str(tmp_path / "other"), tokenised)) == 2
    assert "was begun with another given_tokenizer" in capsys.readouterr().err
    assert main(command(corpus, tokenizer, tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tokenised, corpus, tokenizer, tmp_path, capsys):
    """No file may grow beyond a limit, which a part meets in the middle and notes do not."""
    out, limits = tmp_path / "tokens", resource.getrlimit(resource.RLIMIT_FSIZE)
    biggest = max(p.stat().st_size for p in tokenised.glob("*.bin"))
    smaller = sum(p.stat().st_size < biggest for p in tokenised.glob("train-*.bin"))
    assert smaller > 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(biggest - 1, 8000), limits[1]))
        code = main(command(corpus, tokenizer, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capsys.readouterr().err.strip()
    assert code == 2
    assert line.startswith(f"error: {out}: cannot be written: ")
    assert line.endswith("what is finished stays, and the same command goes on from there")
    assert "\n" not in line
    assert not list(out.glob(".*.tmp"))
    assert main(command(corpus, tokenizer, out)) == 0
    assert content(out) == content(tokenised)


@pytest.mark.slow
def test_a_limit_takes_the_first_tokens_also_with_several_processes(corpus, tokenizer, tmp_path):
    names = {}
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert main(command(corpus, tokenizer, out, "--max_tokens", "30000", "--workers", str(workers))) == 0
        folder = TokenFolder.open(out)
        assert 30000 <= folder.content["train"]["tokens"] < 30000 + 4000 + 256 * 40
        names[workers] = {k: v for k, v in content(out).items() if k != "manifest.json"}
    assert names[1] == names[2]


def test_a_hub_dataset_brings_its_held_out_split(tokenizer, tmp_path):
    (tmp_path / "hub").mkdir()
    folder = hub_folder(tmp_path / "hub", validation=True)
    options = ["--dataset", str(folder), "--dataset_config", "en", "--tokenizer", tokenizer, "--no_progress"]
    assert main(["tokenize", *options, "--eval_tokens", "500", str(tmp_path / "out")]) == 0
    found = TokenFolder.open(tmp_path / "out").content
    assert found["train"]["documents"] == 120
    assert found["held_out"]["tokens"] >= 500


# --- training from it


def batches(make_settings, tokenised, world, count, state=None, *options):
    settings = make_settings("--dataset", str(tokenised), "--seq_len", str(SEQ_LEN), *options)
    found = [prepare_data(settings, BatchPlan(6, 1, world, rank), 32000).train for rank in range(world)]
    for stream in found:
        if state is not None:
            stream.load_state_dict(state)
    drawn = [torch.cat([stream.next_batch() for stream in found]) for _ in range(count)]
    return torch.stack(drawn), found[0].state_dict()


def test_every_token_once_an_epoch_at_any_world_size_and_across_a_resume(make_settings, tokenised):
    tokens = torch.from_numpy(TokenFolder.open(tokenised).tokens("train")[:].astype(np.int64))
    whole, rest = divmod(len(tokens), SEQ_LEN)
    count = 2 * (whole + 1) // 6 + 1
    expected, _ = batches(make_settings, tokenised, 1, count)
    for world in (2, 3):
        assert torch.equal(batches(make_settings, tokenised, world, count)[0], expected)
    first, state = batches(make_settings, tokenised, 2, count // 3)
    second, _ = batches(make_settings, tokenised, 3, count - count // 3, state)
    assert torch.equal(torch.cat([first, second]), expected)

    sequences = expected.reshape(-1, SEQ_LEN)
    cuts = tokens[: whole * SEQ_LEN].reshape(whole, SEQ_LEN)
    assert as_rows(sequences[:whole]) == as_rows(cuts)
    # The second epoch begins with what the first had left: together they hold each token twice.
    both = torch.cat([tokens, tokens])[: (2 * len(tokens) // SEQ_LEN) * SEQ_LEN].reshape(-1, SEQ_LEN)
    assert as_rows(sequences[: len(both)]) == as_rows(both)
    assert rest > 0
    assert not torch.equal(sequences[:whole], cuts)


def as_rows(sequences):
    return sorted(map(tuple, sequences.tolist()))


def test_slices_across_files(tmp_path):
    paths = [tmp_path / f"{i}.bin" for i in range(3)]
    for path, part in zip(paths, np.split(np.arange(10, dtype="<u2"), [4, 5]), strict=True):
        part.tofile(path)
    tokens = TokenFiles(paths, np.dtype("<u2"))
    assert len(tokens) == 10
    for start in range(11):
        for stop in range(start, 12):
            assert tokens[start:stop].tolist() == list(range(10))[start:stop]
    assert token_type(2**16).itemsize == 2
    assert token_type(2**16 + 1).itemsize == 4


def test_the_folder_brings_vocabulary_tokenizer_and_held_out_text(make_settings, tokenised, tokenizer, jsonl):
    options = ["--dataset", str(tokenised), "--seq_len", str(SEQ_LEN)]
    plan = BatchPlan(6, 1, 1, 0)
    data = prepare_data(make_settings(*options, "--tokenizer", tokenizer), plan, 32000)
    assert data.vocab_size == len(data.tokenizer) <= 400
    assert data.held_out.shape[1] == SEQ_LEN
    other = prepare_data(make_settings(*options, "--eval_dataset", str(jsonl)), plan, 32000)
    assert "word" in other.tokenizer.decode(other.held_out[0])
    assert not np.array_equal(other.held_out[0], data.held_out[0])


def copied(tokenised, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(tokenised, tmp_path / "copy"))


def test_damage_is_named(make_settings, tokenised, tmp_path, capsys):
    folder = copied(tokenised, tmp_path)
    assert main(["inspect", str(folder)]) == 0
    assert "whole" in capsys.readouterr().out
    settings = make_settings("--dataset", str(folder), "--seq_len", "16")
    path = folder / "train-00001-0001.bin"
    whole = bytearray(path.read_bytes())
    whole[100] ^= 1
    path.write_bytes(whole)
    assert main(["inspect", str(folder)]) == 1
    assert "train-00001-0001.bin has a wrong checksum" in capsys.readouterr().out
    path.write_bytes(whole[:-2])
    with pytest.raises(ConfigError, match=r"train-00001-0001.bin has \d+ bytes instead of \d+"):
        prepare_data(settings, BatchPlan(6, 1, 1, 0), 32000)
    path.unlink()
    with pytest.raises(ConfigError, match=r"train-00001-0001.bin is missing"):
        prepare_data(settings, BatchPlan(6, 1, 1, 0), 32000)
    (folder / "manifest.json").write_text('{"kind": "lorapre tokens", "format": 9}')
    with pytest.raises(ConfigError, match="is of format 9; this version reads format 1"):
        prepare_data(settings, BatchPlan(6, 1, 1, 0), 32000)


def test_another_tokenizer_and_too_little_held_out_text_are_named(make_settings, tokenised, tmp_path):
    train_bpe(documents(50), 300).save_pretrained(str(tmp_path / "other"))
    options = ["--dataset", str(tokenised), "--tokenizer", str(tmp_path / "other"), "--seq_len", "16"]
    with pytest.raises(ConfigError, match=r"is not the one that .* was tokenised with, which lies in it"):
        prepare_data(make_settings(*options), BatchPlan(6, 1, 1, 0), 32000)
    with pytest.raises(ConfigError, match=r"held-out text is too small.*of 'lorapre tokenize'"):
        prepare_data(make_settings("--dataset", str(tokenised), "--seq_len", "40000"), BatchPlan(1, 1, 1, 0), 32000)
    with pytest.raises(ConfigError, match=r"--vocab_size: .* is tokenised already"):
        prepare_data(make_settings("--dataset", str(tokenised), "--vocab_size", "400"), BatchPlan(6, 1, 1, 0), 32000)
    folder = copied(tokenised, tmp_path)
    load_tokenizer(str(tmp_path / "other")).save_pretrained(str(folder / "tokenizer"))
    with pytest.raises(ConfigError, match="tokenizer/"):
        prepare_data(make_settings("--dataset", str(folder)), BatchPlan(6, 1, 1, 0), 32000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--max_tokens", "0"], "--max_tokens 0"),
        (["--dataset", "gone.jsonl"], "no such file"),
        (["--tokeniser", "x"], "did you mean --tokenizer"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, words):
    assert main(["tokenize", str(tmp_path / "out"), *options]) == 2
    line = capsys.readouterr().err.strip()
    assert words in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()
