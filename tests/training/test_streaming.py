"""Streams: every document on one rank, every token once an epoch, at any world size and across resumes."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data import reading
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.reading import Reader, ReadError
from lorapre_dist.training.data.sequences import prepare_data
from lorapre_dist.training.data.streaming import ShardStream, merge_states
from tests.distributed.harness import run_ranks
from tests.training import flaky
from tests.training.conftest import hub_folder, source_of
from tests.training.data_cases import (
    GLOBAL_BATCH,
    SEQ_LEN,
    number_tokens,
    numbered_shards,
    numbered_stream,
    streamed_case,
)


class Team:
    """Ranks as threads of one process; what they exchange goes through memory."""

    def __init__(self, path, world, global_batch=GLOBAL_BATCH, state=None, **options):
        self.barrier, self.values = threading.Barrier(world, timeout=60), [None] * world
        self.ranks = [
            numbered_stream(path, BatchPlan(global_batch, 1, world, r), exchange=self.exchange(r), **options)
            for r in range(world)
        ]
        for rank in self.ranks:
            if state is not None:
                rank.load_state_dict(state)
        self.threads = ThreadPoolExecutor(world)

    def exchange(self, rank):
        def exchange(value):
            self.values[rank] = value
            self.barrier.wait()
            everyone = list(self.values)
            self.barrier.wait()
            return everyone

        return exchange

    def next_batch(self):
        return torch.cat(list(self.threads.map(lambda rank: rank.next_batch(), self.ranks)))

    def batches(self, count):
        return torch.stack([self.next_batch() for _ in range(count)])

    def state(self):
        return merge_states([rank.state_dict() for rank in self.ranks])


@pytest.fixture(scope="module", params=["jsonl.gz", "parquet"])
def shards(request, tmp_path_factory):
    """A folder of three shards, and how many tokens are in them."""
    folder = tmp_path_factory.mktemp("shards")
    return str(folder), numbered_shards(folder, request.param)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return str(folder), numbered_shards(folder, "jsonl.gz")


@pytest.mark.slow
@pytest.mark.parametrize("buffer", [0, 20])
def test_every_token_once_an_epoch_at_any_world_size_and_across_a_resume(shards, buffer):
    """Over gloo. The epoch's last batch need not be full: what fills it belongs to the next epoch."""
    path, count = shards
    batches = -(-2 * count // (SEQ_LEN * GLOBAL_BATCH))
    expected = None
    for world in (1, 2, 3):
        parts = run_ranks(world, streamed_case, path=path, buffer=buffer, batches=batches)
        tokens = torch.stack([torch.cat(batch) for batch in zip(*(part for part, _ in parts), strict=True)])
        for epoch in range(2):
            seen = tokens.flatten()[epoch * count : (epoch + 1) * count]
            assert torch.equal(seen.sort().values, torch.arange(count)), (world, epoch)
        assert (tokens.flatten()[:count] == tokens.flatten()[count : 2 * count]).float().mean() < (0.5 if buffer else 2)
        assert expected is None or torch.equal(tokens, expected)
        expected = tokens

    done = batches // 3
    first = run_ranks(2, streamed_case, path=path, buffer=buffer, batches=done)
    options = {"buffer": buffer, "batches": batches - done, "state": first[0][1]}
    second = run_ranks(3, streamed_case, path=path, **options)
    found = [torch.stack([torch.cat(b) for b in zip(*(x for x, _ in y), strict=True)]) for y in (first, second)]
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("buffer", [0, 20])
def test_a_stream_resumes_exactly_at_every_position(three_shards, buffer):
    path, count = three_shards
    running = Team(path, 2, buffer=buffer)
    batches = 2 * count // (SEQ_LEN * GLOBAL_BATCH) + 3
    states, found = [running.state()], []
    for _ in range(batches):
        found.append(running.next_batch())
        states.append(running.state())
    for done in range(0, batches - 1, 5):
        resumed = Team(path, 3, buffer=buffer, state=states[done])
        assert torch.equal(resumed.batches(batches - done), torch.stack(found[done:])), done


def test_a_second_pass_begins_at_the_beginning_also_after_a_resume(three_shards):
    """A dataset that was given a position starts every later pass there too, unless it is told not to."""
    path, count = three_shards
    state = Team(path, 1).state()
    first = Team(path, 1)
    first.batches(count // (SEQ_LEN * GLOBAL_BATCH) - 2)
    resumed = Team(path, 1, state=first.state())
    resumed.batches(4)
    assert resumed.ranks[0].epoch == 1
    assert torch.equal(resumed.next_batch(), first.batches(5)[-1])
    resumed.ranks[0].load_state_dict(state)
    assert torch.equal(resumed.batches(3), Team(path, 1).batches(3))


def test_each_shard_is_read_by_one_rank(tmp_path):
    folder = hub_folder(tmp_path, validation=False)
    for world in (1, 2, 3, 6):
        streams = [
            ShardStream(source_of(folder, config="en"), number_tokens, 16, BatchPlan(12, 1, world, rank))
            for rank in range(world)
        ]
        lanes = [number for stream in streams for number in stream.lanes]
        assert lanes == [0, 1, 2, 3]
        sizes = [len(stream.lanes) for stream in streams]
        assert max(sizes) - min(sizes) <= 1


def test_more_shards_than_lanes_are_taken_in_turn(tmp_path, monkeypatch):
    count = numbered_shards(tmp_path, "jsonl.gz")
    monkeypatch.setattr("lorapre_dist.training.data.streaming.MOST_LANES", 2)
    batches = count // (SEQ_LEN * GLOBAL_BATCH)
    one, two = Team(str(tmp_path), 1, buffer=9), Team(str(tmp_path), 2, buffer=9)
    assert one.ranks[0].lane_count == 2
    found = one.batches(batches)
    assert len(found.unique()) == found.numel()
    assert torch.equal(two.batches(batches), found)


def test_the_seed_and_the_epoch_decide_the_order(three_shards):
    path, count = three_shards
    whole = count // (SEQ_LEN * GLOBAL_BATCH)
    first, again = Team(path, 1, buffer=30, seed=1), Team(path, 2, buffer=30, seed=1)
    found = first.batches(whole)
    assert torch.equal(found, again.batches(whole))
    assert not torch.equal(found, first.batches(whole))
    assert not torch.equal(found, Team(path, 1, buffer=30, seed=2).batches(whole))
    assert not torch.equal(found, Team(path, 1).batches(whole))
    # Sequences are cut before they are shuffled: their tokens stay together.
    assert (found[..., 1:] - found[..., :-1] == 1).float().mean() > 0.9


def test_a_position_of_another_stream_is_refused(three_shards):
    path, _ = three_shards
    state = Team(path, 1).state()
    for options in ({"buffer": 5}, {"seed": 3}, {"global_batch": 4}):
        with pytest.raises(ConfigError, match="another dataset, batch size"):
            Team(path, 1, state=state, **options)


def test_a_stream_without_text_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(ConfigError, match="holds no text to train on"):
        Team(str(tmp_path), 2).next_batch()


def test_a_reader_goes_on_behind_the_last_row(three_shards):
    path, _ = three_shards
    source = source_of(path, streaming=True)
    whole = Reader("x", source.stream.shard(num_shards=1, index=0)).read(1000)
    assert len(whole) == 126
    for done in (0, 1, 31, 125, 126):
        reader = Reader("x", source.stream.shard(num_shards=1, index=0))
        assert reader.read(done) == whole[:done]
        again = Reader("x", source.stream.shard(num_shards=1, index=0))
        again.load_state_dict(reader.state_dict())
        assert again.read(1000) == whole[done:]
        assert again.ended


# --- failing reads


@pytest.fixture
def outage(monkeypatch):
    """Reads of ``flaky://`` fail as the test says; pauses are short."""
    flaky.register()
    monkeypatch.setattr(reading, "FIRST_PAUSE", 0.01)
    # Shorter than the pauses: the others are told to wait.
    monkeypatch.setattr("lorapre_dist.training.data.streaming.PATIENCE", 0.002)
    yield flaky.Outage
    flaky.Outage.good = flaky.Outage.failures = 0


def flaky_url(shards):
    path, count = shards
    kind = "parquet" if list(Path(path).glob("*.parquet")) else "jsonl.gz"
    return f"flaky://{path}/part-*.{kind}", count


@pytest.mark.parametrize("good", [0, 1, 2, 5])
def test_failed_reads_are_tried_again_and_lose_nothing(shards, outage, good, caplog):
    url, count = flaky_url(shards)
    stream = Team(url, 2, buffer=9)
    outage.good, outage.failures = good, 4
    batches = count // (SEQ_LEN * GLOBAL_BATCH)
    found = stream.batches(batches)
    assert outage.failures == outage.good == 0
    assert "connection reset by the storage; trying again in" in caplog.text
    assert torch.equal(found, Team(shards[0], 1, buffer=9).batches(batches))


def until_error(stream):
    found = []
    try:
        while len(found) < 1000:
            found.append(stream.next_batch())
    except ReadError as error:
        return found, str(error)
    raise AssertionError("no read failed")


@pytest.mark.parametrize("good", [0, 5])
def test_reads_that_keep_failing_end_on_every_rank_and_can_be_resumed(shards, outage, good):
    url, count = flaky_url(shards)
    expected = Team(shards[0], 1, buffer=9).batches(3 * count // (SEQ_LEN * GLOBAL_BATCH))
    team = Team(url, 3, buffer=9)
    outage.good, outage.failures = good, 10**6
    results = list(team.threads.map(until_error, team.ranks))
    (message,) = {message for _, message in results}
    told = (
        rf"--dataset {url}: cannot be read, tried 5 times: {url}: ConnectionResetError: connection reset by the storage"
    )
    assert re.fullmatch(told.replace("*", r"[*\d]"), message)
    found = [torch.cat(parts) for parts in zip(*(batches for batches, _ in results), strict=True)]
    outage.failures = 0
    resumed = Team(url, 2, buffer=9, state=team.state())
    found = torch.stack([*found, *resumed.batches(len(expected) - len(found))])
    assert torch.equal(found, expected)


def test_what_is_no_data_is_not_tried_again(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "0 1 2 3"}\n{"text"')
    with pytest.raises(ConfigError, match="cannot be read"):
        Team(str(tmp_path / "a.jsonl"), 1).next_batch()
    assert "trying again" not in caplog.text


def test_a_local_file_can_be_streamed(make_settings, jsonl):
    options = ["--dataset", str(jsonl), "--streaming", "--seq_len", "16", "--vocab_size", "300"]
    data = prepare_data(make_settings(*options, "--eval_fraction", "0.2"), BatchPlan(4, 2, 1, 0), 300)
    assert data.train.shards == 1
    assert len(data.held_out) > 10
