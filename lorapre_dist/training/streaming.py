"""Corpora that are tokenised while training, from one or many shards, exactly resumable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.training.batches import BatchPlan
from lorapre_dist.training.documents import Source, first_line

# Streams that are open at once over all ranks: each rank reads its own, so few would be read twice and many
# would cost connections.
MOST_LANES = 64
PULL_DOCUMENTS = 32

Encode = Callable[[list[str]], list[list[int]]]


class Lane:
    """An endless sequence of packed sequences from one part of a stream; starts over when the part ends."""

    def __init__(self, source: Source, shard: Any, encode: Encode, seq_len: int, keep: Callable[[str], bool]) -> None:
        self.source, self.shard, self.encode, self.seq_len, self.keep = source, shard, encode, seq_len, keep
        self.epoch = 0
        self.tokens: list[int] = []
        self._rows: Iterator[Any] | None = None
        self._found = False

    def take(self, count: int) -> torch.Tensor:
        """The next ``count`` sequences, ``(count, seq_len)``, int64."""
        wanted = count * self.seq_len
        while len(self.tokens) < wanted:
            self._pull()
        result = torch.tensor(self.tokens[:wanted], dtype=torch.int64).view(count, self.seq_len)
        del self.tokens[:wanted]
        return result

    def _pull(self) -> None:
        if self._rows is None:
            self._rows = iter(self.shard)
        texts: list[str] = []
        ended = False
        while len(texts) < PULL_DOCUMENTS and not ended:
            try:
                text = next(self._rows)[self.source.column]
            except StopIteration:
                ended = True
            except Exception as error:  # datasets raises many kinds, from network errors to bare Exception
                raise ConfigError(f"--dataset {self.source.name}: cannot be read: {first_line(error)}") from error
            else:
                if isinstance(text, str) and text and self.keep(text):
                    texts.append(text)
        for ids in self.encode(texts) if texts else []:
            self.tokens += ids
            self._found = True
        if ended:
            if not self._found:
                raise ConfigError(f"--dataset {self.source.name}: a part of it holds no text to train on")
            self.epoch += 1
            self._rows, self._found = None, False

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream and the tokens read but not yet used; plain values and one tensor."""
        running = self._rows is not None
        return {
            "epoch": self.epoch,
            "found": self._found,
            "tokens": torch.tensor(self.tokens, dtype=torch.int32),
            "stream": copy.deepcopy(self.shard.state_dict()) if running else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``."""
        self.epoch, self._found = int(state["epoch"]), bool(state["found"])
        self.tokens = state["tokens"].tolist()
        self._rows = None
        if state["stream"] is not None:
            self.shard.load_state_dict(copy.deepcopy(state["stream"]))
            self._rows = iter(self.shard)


class LaneStream:
    """A stream cut into lanes; every global batch holds the same number of sequences of each lane.

    A rank opens only the lanes that its part of the batch comes from, so that text is read and tokenised once
    where the lanes can be divided among the ranks. Lanes do not depend on the number of ranks, hence neither does
    the batch.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        seq_len: int,
        plan: BatchPlan,
        keep: Callable[[str], bool] = lambda text: True,
    ) -> None:
        self.plan = plan
        self.lanes_in_all = lane_count(plan.global_batch, source.stream.num_shards)
        self.per_lane = plan.global_batch // self.lanes_in_all
        last = plan.first + plan.per_rank - 1
        self.lanes = {
            index: Lane(source, self._shard(source.stream, index), encode, seq_len, keep)
            for index in range(plan.first // self.per_lane, last // self.per_lane + 1)
        }

    def _shard(self, stream: Any, index: int) -> Any:
        # A copy, for each lane keeps its own position.
        if self.lanes_in_all == 1:
            return copy.deepcopy(stream)
        return stream.shard(num_shards=self.lanes_in_all, index=index, contiguous=False)

    def next_batch(self) -> torch.Tensor:
        """This rank's sequences of the next global batch, ``(per_rank, seq_len)``, int64."""
        taken = torch.cat([lane.take(self.per_lane) for lane in self.lanes.values()])
        skipped = self.plan.first - min(self.lanes) * self.per_lane
        return taken[skipped : skipped + self.plan.per_rank]

    def state_dict(self) -> dict[str, Any]:
        """Positions of this rank's lanes, by lane."""
        return {
            "kind": "lanes",
            "count": self.lanes_in_all,
            "lanes": {i: x.state_dict() for i, x in self.lanes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``, which must hold every lane of this rank."""
        if state.get("kind") != "lanes" or state["count"] != self.lanes_in_all:
            raise ConfigError("the checkpoint's data position is of another dataset or batch size")
        for index, lane in self.lanes.items():
            lane.load_state_dict(state["lanes"][index])


class Prefetch:
    """Draws the next batch of a stream in a thread, while the model works on this one."""

    def __init__(self, stream: LaneStream) -> None:
        self.stream = stream
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._next: Future[tuple[torch.Tensor, dict[str, Any]]] | None = None
        self._state = stream.state_dict()

    def next_batch(self) -> torch.Tensor:
        """The stream's next batch."""
        pending = self._next or self._thread.submit(self._draw)
        self._next = None
        batch, self._state = pending.result()
        self._next = self._thread.submit(self._draw)
        return batch

    def _draw(self) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.stream.next_batch(), self.stream.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``; what was drawn ahead is dropped."""
        if self._next is not None:
            self._next.cancel()
            wait([self._next])
            self._next = None
        self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()


def lane_count(global_batch: int, shards: int) -> int:
    """The largest divisor of ``global_batch`` that is at most the number of shards and ``MOST_LANES``."""
    return max(d for d in range(1, min(MOST_LANES, shards, global_batch) + 1) if global_batch % d == 0)


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state for all ranks from every rank's own; a lane that two ranks share stands at one position in both."""
    if states[0]["kind"] != "lanes":
        return states[0]
    return {**states[0], "lanes": {i: lane for state in states for i, lane in state["lanes"].items()}}
