from __future__ import annotations

import gzip
import json
import multiprocessing

import numpy as np
import pytest
import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data import builtin_text
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.order import Permutation
from lorapre_dist.training.data.sequences import prepare_data
from lorapre_dist.training.data.splits import finite_split, streaming_split
from lorapre_dist.training.data.streaming import ShardStream
from lorapre_dist.training.data.tokenizer import Encoder, trained_tokenizer
from lorapre_dist.training.data.tokens import TokenStream, token_file
from tests.training.conftest import documents, hub_folder, source_of


def numbers(texts):
    """A tokenizer for tests: one token per document's length, then 0."""
    return [[len(text), 0] for text in texts]


# --- documents


@pytest.mark.slow
def test_builtin_text_is_the_same_each_time_and_large_enough():
    first = list(builtin_text.documents())
    assert first == list(builtin_text.documents())
    assert sum(map(len, first)) > 1_500_000
    assert len(set(first)) == len(first)
    assert any("def b64encode(s, altchars=None):" in text for text in first)


def test_text_files_are_cut_at_blank_lines(tmp_path):
    (tmp_path / "b.txt").write_text("third\nstill third\n\nfourth\n")
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    found = [text.strip() for text in source_of(tmp_path).documents()]
    assert found == ["first", "second", "third\nstill third", "fourth"]


def test_jsonl_parquet_csv_and_compressed_files_hold_the_same(tmp_path, jsonl):
    from datasets import Dataset

    texts = documents(120)
    table = Dataset.from_dict({"text": texts, "number": list(range(120))})
    table.to_parquet(str(tmp_path / "c.parquet"))
    table.to_csv(str(tmp_path / "c.csv"))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(jsonl.read_text())
    for path in (jsonl, tmp_path / "c.parquet", tmp_path / "c.csv", tmp_path / "c.jsonl.gz"):
        assert list(source_of(path).documents()) == texts, path
    assert list(source_of(tmp_path / "*.gz").documents()) == texts


def test_fingerprints_follow_the_content_not_the_place(tmp_path, jsonl):
    copy = tmp_path / jsonl.name
    copy.write_bytes(jsonl.read_bytes())
    assert source_of(copy).fingerprint == source_of(jsonl).fingerprint
    copy.write_bytes(jsonl.read_bytes().replace(b"document 119", b"document 118"))
    assert source_of(copy).fingerprint != source_of(jsonl).fingerprint


def test_the_only_text_column_is_found(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"body": "one", "id": 1}\n{"body": "two", "id": 2}\n')
    assert list(source_of(path).documents()) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("e.jsonl", "", None, "is empty|cannot be"),
        ("e.txt", "", None, "is empty|cannot be"),
        ("bad.jsonl", '{"text": "a"}\n{broken\n', None, "cannot be read"),
        ("bad.parquet", "no parquet", None, "cannot be"),
        ("two.jsonl", '{"a": "x", "b": "y"}\n', None, "--text_column: a, b"),
        ("two.jsonl", '{"a": "x", "b": "y"}\n', "c", "--text_column c"),
        ("num.jsonl", '{"a": 1}\n', "a", "holds int, not text"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, column, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        list(source_of(path, column=column).documents())
    assert "\n" not in str(caught.value)


def test_folders_without_data_or_with_mixed_kinds_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no"):
        source_of(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ConfigError, match=r"mixes json \(b.jsonl\) and text \(a.txt\) files"):
        source_of(tmp_path)


@pytest.mark.parametrize("validation", [True, False])
def test_hub_form_streams_with_its_own_or_a_made_split(tmp_path, make_settings, validation):
    folder = hub_folder(tmp_path, validation=validation)
    options = ["--dataset", str(folder), "--dataset_config", "en", "--seq_len", "16", "--eval_fraction", "0.2"]
    settings = make_settings(*options, "--vocab_size", "300", "--eval_batches", "3")
    data = prepare_data(settings, BatchPlan(4, 2, 1, 0), 300)
    assert isinstance(data.train, ShardStream)
    assert data.train.shards == 4
    assert data.held_out.shape == (12, 16)
    assert data.train.next_batch().shape == (4, 16)


# --- splits


def test_held_out_documents_are_disjoint_and_independent_of_order(tmp_path, jsonl, cache):
    split = finite_split(source_of(jsonl), 0.1, cache)
    texts = documents(120)
    held_out = [text for text in texts if split.held_out(text)]
    share = sum(map(len, held_out)) / sum(map(len, texts))
    assert 0.1 <= share < 0.12
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    assert finite_split(source_of(shuffled), 0.1, cache) == split
    streamed = [text for text in documents(2000) if streaming_split(0.1).held_out(text)]
    assert 140 < len(streamed) < 260  # 200 +- 4.5 standard deviations of a binomial


def test_one_document_holds_out_its_end(tmp_path, make_settings):
    path = tmp_path / "one.txt"
    path.write_text(" ".join(documents(60)))
    settings = make_settings("--dataset", str(path), "--seq_len", "16", "--vocab_size", "300", "--eval_fraction", "0.1")
    data = prepare_data(settings, BatchPlan(4, 2, 1, 0), 300)
    everything = np.concatenate([data.train.tokens.reshape(-1)[-3:], np.asarray(data.held_out).reshape(-1)[:3]])
    assert len(everything) == 6
    share = data.held_out.size / (data.held_out.size + data.train.tokens.size)
    assert share == pytest.approx(0.1, abs=0.02)


def test_an_evaluation_file_of_its_own(tmp_path, make_settings, jsonl):
    path = tmp_path / "eval.txt"
    path.write_text("\n\n".join(f"other words {i} " * 20 for i in range(20)))
    options = ["--dataset", str(jsonl), "--eval_dataset", str(path), "--seq_len", "16", "--vocab_size", "300"]
    data = prepare_data(make_settings(*options), BatchPlan(4, 2, 1, 0), 300)
    source = source_of(jsonl)
    whole = prepare_data(
        make_settings("--dataset", str(jsonl), "--seq_len", "16", "--vocab_size", "300"), BatchPlan(4, 2, 1, 0), 300
    )
    assert data.train.blocks > whole.train.blocks
    assert data.fingerprint.startswith(source.fingerprint)


def test_too_little_text_is_refused(tmp_path, make_settings):
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(6)))
    options = ["--dataset", str(path), "--vocab_size", "300"]
    with pytest.raises(ConfigError, match="one batch needs 400"):
        prepare_data(make_settings(*options, "--seq_len", "16", "--eval_fraction", "0.2"), BatchPlan(400, 2, 1, 0), 300)
    with pytest.raises(ConfigError, match="held-out text is too small"):
        prepare_data(make_settings(*options, "--seq_len", "400"), BatchPlan(1, 1, 1, 0), 300)


# --- tokens


def test_token_file_packs_documents_with_ends_between(tmp_path):
    texts = ["a", "bb", "ccc"]
    tokens = token_file(tmp_path / "x" / "t", lambda: iter(texts), numbers)
    assert tokens.tolist() == [1, 0, 2, 0, 3, 0]
    assert token_file(tmp_path / "x" / "t", lambda: iter(["changed"]), numbers).tolist() == tokens.tolist()
    assert token_file(tmp_path / "x" / "u", lambda: iter(texts), numbers, limit=3).tolist() == [1, 0, 2]


def stream(plan, seed=0, blocks=23):
    return TokenStream(np.arange(blocks * 4 + 3, dtype=np.uint32), 4, plan, seed)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_global_batches_do_not_depend_on_the_world_size(world):
    whole = stream(BatchPlan(6, 1, 1, 0))
    parts = [stream(BatchPlan(6, 1, world, rank)) for rank in range(world)]
    for _ in range(9):
        expected = whole.next_batch()
        assert torch.equal(torch.cat([part.next_batch() for part in parts]), expected)


def test_an_epoch_uses_every_token_once_in_another_order():
    """95 tokens in sequences of 4: what is left of an epoch leads the next."""
    data = stream(BatchPlan(1, 1, 1, 0))
    drawn = [data.next_batch()[0].tolist() for _ in range(4 * 95 // 4)]
    assert sorted(token for sequence in drawn for token in sequence) == sorted(4 * list(range(95)))
    first, second = drawn[:23], drawn[23:47]
    assert sorted(first) == [list(range(4 * i, 4 * i + 4)) for i in range(23)]
    assert [92, 93, 94, 0] in second
    assert sorted(token for sequence in second for token in sequence) == sorted([*range(92, 95), *range(93)])
    assert first != sorted(first)
    assert stream(BatchPlan(1, 1, 1, 0), seed=1).next_batch()[0].tolist() != first[0]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000, 4097])
def test_a_permutation_by_formula_is_one(count):
    places = np.arange(count)
    found = Permutation(count, [0, 7], in_memory=0)[places]
    assert np.array_equal(np.sort(found), places)
    assert np.array_equal(found, Permutation(count, [0, 7], in_memory=0)[places])
    if count >= 1000:
        assert not np.array_equal(found, Permutation(count, [0, 8], in_memory=0)[places])
        # As far from the identity, and as little like a shift, as a random one.
        assert abs(np.corrcoef(found, places)[0, 1]) < 5 / count**0.5
        assert len(np.unique((found - places) % count)) > 0.6 * count


@pytest.mark.parametrize("done", [0, 1, 5, 11])
def test_token_position_resumes_exactly(done):
    plan = BatchPlan(4, 2, 2, 1)
    data = stream(plan)
    for _ in range(done):
        data.next_batch()
    resumed = stream(plan)
    resumed.load_state_dict(data.state_dict())
    for _ in range(8):
        assert torch.equal(resumed.next_batch(), data.next_batch())


# --- tokenizer


def test_tokenizer_is_trained_once_and_cached(tmp_path, jsonl):
    calls = []

    def texts():
        calls.append(1)
        return source_of(jsonl).documents()

    first = trained_tokenizer(texts, "key", 400, tmp_path)
    second = trained_tokenizer(texts, "key", 400, tmp_path)
    assert len(calls) == 1
    assert Encoder(first).fingerprint == Encoder(second).fingerprint
    text = "Any bytes: \N{SNOWMAN} word1 word2"
    ids = Encoder(first)([text])[0]
    assert ids[-1] == first.eos_token_id
    assert first.decode(ids[:-1]) == text


def _train(folder, path, barrier, results):
    barrier.wait()
    tokenizer = trained_tokenizer(lambda: source_of(path).documents(), "key", 400, folder)
    results.put(Encoder(tokenizer).fingerprint)


@pytest.mark.slow
def test_processes_that_start_together_train_one_tokenizer(tmp_path, jsonl):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_train, args=(tmp_path, jsonl, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = {results.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(timeout=30)
        assert worker.exitcode == 0
    assert len(found) == 1
    assert [p.name for p in (tmp_path / "tokenizers").iterdir() if not p.name.endswith(".lock")] == ["bpe400-key"]


def test_tokenizer_from_a_folder_and_bad_folders(tmp_path, make_settings, jsonl):
    trained = trained_tokenizer(lambda: source_of(jsonl).documents(), "key", 400, tmp_path)
    trained.save_pretrained(str(tmp_path / "mine"))
    options = ["--dataset", str(jsonl), "--seq_len", "16", "--tokenizer", str(tmp_path / "mine")]
    data = prepare_data(make_settings(*options), BatchPlan(4, 2, 1, 0), 32000)
    assert data.vocab_size == len(trained) <= 400
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prepare_data(make_settings(*options[:-1], str(tmp_path / "empty")), BatchPlan(4, 2, 1, 0), 32000)
    trained.eos_token = None
    trained.save_pretrained(str(tmp_path / "endless"))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        prepare_data(make_settings(*options[:-1], str(tmp_path / "endless")), BatchPlan(4, 2, 1, 0), 32000)
