"""Corpora that are tokenised while training: each document on one rank, once an epoch, exactly resumable."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.documents import PULL_ROWS, Source, stream_of, texts
from lorapre_dist.training.data.order import ShuffleBuffer
from lorapre_dist.training.data.reading import Reader, ReadError
from lorapre_dist.training.run import ranks

# Shards that are open at once over all ranks: few would keep ranks waiting for one, many would cost connections.
MOST_LANES = 64
# Seconds after which a rank that is still reading tells the others so.
PATIENCE = 10.0

Encode = Callable[[list[str]], list[list[int]]]
Keep = Callable[[str], bool]


@dataclass
class Chunk:
    """What a lane gives at a time.

    Attributes:
        sequences: ``(n, seq_len)``, int32.
        rest: tokens behind the last whole sequence, once the shard is at its end.
        ended: nothing more comes from this shard.
    """

    sequences: np.ndarray
    rest: np.ndarray
    ended: bool


class Lane:
    """One shard of the stream as packed sequences, which pass through a shuffle buffer."""

    def __init__(self, stream: _Settings, shard: int, epoch: int) -> None:
        self.shard, self.stream = shard, stream
        source = stream.source
        data = stream_of(source)
        self.reader = Reader(source.name, data.shard(num_shards=data.num_shards, index=shard), source.attempts)
        self.buffer = ShuffleBuffer(stream.buffer, stream.seq_len, [stream.seed, epoch, shard])
        self.tokens = np.zeros(0, dtype=np.int32)
        self.ready = np.zeros((0, stream.seq_len), dtype=np.int32)

    def take(self, count: int) -> Chunk:
        """The next ``count`` sequences, fewer at the end of the shard.

        Raises:
            ReadError: the shard cannot be read; what was read before is kept for the next call.
        """
        while len(self.ready) < count and not self.reader.ended:
            self._pull()
        ended = self.reader.ended and len(self.ready) <= count
        chunk = Chunk(self.ready[:count], self.tokens if ended else self.tokens[:0], ended)
        self.ready = self.ready[count:]
        return chunk

    def _pull(self) -> None:
        stream = self.stream
        found = texts(stream.source.name, stream.source.column, self.reader.read(PULL_ROWS))
        kept = [text for text in found if stream.keep(text)]
        parts = [np.asarray(ids, dtype=np.int32) for ids in (stream.encode(kept) if kept else [])]
        tokens = np.concatenate([self.tokens, *parts])
        whole = len(tokens) // stream.seq_len * stream.seq_len
        self.tokens = tokens[whole:]
        out = self.buffer.push(tokens[:whole].reshape(-1, stream.seq_len))
        left = self.buffer.drain() if self.reader.ended else out[:0]
        self.ready = np.concatenate([self.ready, out, left])

    def state_dict(self, drawn: Chunk | None) -> dict[str, Any]:
        """Position in the shard and what was read but not yet used; ``drawn`` counts as not used."""
        ready = self.ready if drawn is None else np.concatenate([drawn.sequences, self.ready])
        return {
            "shard": self.shard,
            "reader": self.reader.state_dict(),
            "buffer": self.buffer.state_dict(),
            "tokens": torch.from_numpy(self.tokens.copy()),
            "ready": torch.from_numpy(ready.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``, which is of this shard."""
        self.reader.load_state_dict(state["reader"])
        self.buffer.load_state_dict(state["buffer"])
        self.tokens, self.ready = state["tokens"].numpy().copy(), state["ready"].numpy().copy()


@dataclass(frozen=True)
class _Settings:
    source: Source
    encode: Encode
    seq_len: int
    keep: Keep
    buffer: int
    seed: int


class ShardStream:
    """Sequences of a sharded stream; batches and epochs do not depend on the number of ranks.

    Up to 64 shards are read at once, each (a lane) by one rank, which alone reads and tokenises its documents. In
    rounds every lane gives its next sequences, which all ranks exchange and append to one queue; a global batch is
    what stands at its front. A lane whose shard ends takes the next shard that none has begun. An epoch ends when
    every shard has: then each document was used once, and what is left of it, less than a sequence, leads the next.

    Args:
        keep: documents to train on.
        buffer: sequences that wait to be shuffled, over all lanes; 0 also keeps the shards in order.
        exchange: every rank's value from each rank's own, a collective.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        seq_len: int,
        plan: BatchPlan,
        keep: Keep = lambda text: True,
        *,
        buffer: int = 0,
        seed: int = 0,
        exchange: Callable[[Any], list[Any]] = ranks.gathered,
    ) -> None:
        self.plan, self.exchange = plan, exchange
        self.shards = int(stream_of(source).num_shards)
        self.lane_count = min(MOST_LANES, self.shards)
        self.per_round = -(-plan.global_batch // self.lane_count)
        self._settings = _Settings(source, encode, seq_len, keep, -(-buffer // self.lane_count), seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._pending: Future[tuple[dict[int, Chunk], ConfigError | None]] | None = None
        self.queue = np.zeros((0, seq_len), dtype=np.int32)
        self.rest = np.zeros(0, dtype=np.int32)
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self.found = epoch, False
        self.order = np.arange(self.shards)
        if self._settings.buffer:
            np.random.default_rng([self._settings.seed, epoch]).shuffle(self.order)
        self.begun = 0
        # Of every lane, also other ranks': the shard it reads, None when there is no further one.
        self.reading: list[int | None] = [None] * self.lane_count
        self.lanes: dict[int, Lane] = {}
        for lane in range(self.lane_count):
            self._next_shard(lane)

    def _next_shard(self, lane: int) -> None:
        self.lanes.pop(lane, None)
        self.reading[lane] = None
        if self.begun < self.shards:
            self.reading[lane] = shard = int(self.order[self.begun])
            self.begun += 1
            if self._mine(lane):
                self.lanes[lane] = Lane(self._settings, shard, self.epoch)

    def _mine(self, lane: int) -> bool:
        # Spread evenly over the ranks, hence over the nodes too.
        return lane * self.plan.world_size // self.lane_count == self.plan.rank

    def next_batch(self) -> torch.Tensor:
        """This rank's sequences of the next global batch, ``(per_rank, seq_len)``, int64; a collective.

        Raises:
            ReadError: on every rank, if any cannot read; the position stays that of the batch before.
        """
        while len(self.queue) < self.plan.global_batch:
            self._round()
        batch, self.queue = np.split(self.queue, [self.plan.global_batch])
        own = batch[self.plan.first : self.plan.first + self.plan.per_rank]
        self._drawn_ahead()
        return torch.from_numpy(own.astype(np.int64))

    def _round(self) -> None:
        given = self._given()
        while any(value is None for value in given):  # nobody waits in a collective for as long as a read may take
            given = self._given()
        failed = [value for value in given if isinstance(value, tuple)]
        if failed:
            again, message = failed[0]
            raise ReadError(message) if again else ConfigError(message)
        self._pending = None
        for lane, chunk in sorted((item for part in given for item in part.items()), key=lambda item: item[0]):
            self.queue = np.concatenate([self.queue, chunk.sequences])
            self.found |= bool(len(chunk.sequences) or len(chunk.rest))
            if chunk.ended:
                self._append_rest(chunk.rest)
                self._next_shard(lane)
        if not any(shard is not None for shard in self.reading):
            if not self.found:
                raise ConfigError(f"--dataset {self._settings.source.name}: holds no text to train on")
            self._start_epoch(self.epoch + 1)

    def _given(self) -> list[Any]:
        """Of each rank the next chunks, why there are none, or ``None``: not yet."""
        own = self._drawn_ahead()
        if not wait([own], timeout=PATIENCE).done:
            return self.exchange(None)
        chunks, error = own.result()
        # A message in place of chunks: all ranks raise together instead of waiting for one that is gone.
        return self.exchange(chunks if error is None else (type(error) is ReadError, str(error)))

    def _append_rest(self, rest: np.ndarray) -> None:
        seq_len = self._settings.seq_len
        tokens = np.concatenate([self.rest, rest])
        whole = len(tokens) // seq_len * seq_len
        self.queue = np.concatenate([self.queue, tokens[:whole].reshape(-1, seq_len)])
        self.rest = tokens[whole:]

    def _drawn_ahead(self) -> Future[tuple[dict[int, Chunk], ConfigError | None]]:
        """The next round's chunks of this rank, drawn in a thread while the model works."""
        if self._pending is None:
            self._pending = self._thread.submit(self._draw, dict(self.lanes))
        return self._pending

    def _draw(self, lanes: dict[int, Lane]) -> tuple[dict[int, Chunk], ConfigError | None]:
        chunks: dict[int, Chunk] = {}
        for number, lane in lanes.items():
            try:
                chunks[number] = lane.take(self.per_round)
            except ConfigError as error:
                return chunks, error
        return chunks, None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch: of this rank's lanes, and on rank 0 what all ranks share."""
        drawn = {} if self._pending is None else self._pending.result()[0]
        shared = {
            "queue": torch.from_numpy(self.queue.copy()),
            "rest": torch.from_numpy(self.rest.copy()),
            "epoch": self.epoch,
            "begun": self.begun,
            "found": self.found,
            "reading": list(self.reading),
        }
        return {
            "kind": "shards",
            "of": self._identity(),
            "shared": shared if self.plan.rank == 0 else None,
            "lanes": {number: lane.state_dict(drawn.get(number)) for number, lane in self.lanes.items()},
        }

    def _identity(self) -> list[int]:
        settings = self._settings
        return [self.shards, self.plan.global_batch, settings.seq_len, settings.buffer, settings.seed]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``, merged of all ranks' states; what was drawn ahead is dropped."""
        if state.get("kind") != "shards" or state["of"] != self._identity():
            raise ConfigError(
                "the checkpoint's data position is of another dataset, batch size, seq_len, seed or shuffle buffer"
            )
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        shared = state["shared"]
        self._start_epoch(int(shared["epoch"]))
        self.queue, self.rest = shared["queue"].numpy().copy(), shared["rest"].numpy().copy()
        self.begun, self.found, self.reading = int(shared["begun"]), bool(shared["found"]), list(shared["reading"])
        self.lanes = {}
        for number, shard in enumerate(self.reading):
            if shard is not None and self._mine(number):
                self.lanes[number] = Lane(self._settings, shard, self.epoch)
                self.lanes[number].load_state_dict(state["lanes"][number])


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state for all ranks from every rank's own, in order of rank."""
    if states[0]["kind"] != "shards":
        return states[0]
    return {**states[0], "lanes": {number: lane for state in states for number, lane in state["lanes"].items()}}
