"""Cases for ranks: what a stream gives on each of them, over gloo."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.streaming import ShardStream, merge_states
from tests.training.conftest import source_of

SEQ_LEN, GLOBAL_BATCH = 8, 6
# Documents of the three shards: one longer than both others.
SHARDS = (25, 90, 11)


def numbered_shards(folder: Path, kind: str) -> int:
    """Three shards whose tokens are the numbers 0, 1, 2, ...; how many there are, a multiple of ``SEQ_LEN``."""
    count, number, left = 0, 0, -sum(1 + i % 9 for i in range(sum(SHARDS))) % SEQ_LEN
    for shard, documents in enumerate(SHARDS):
        rows = []
        for _ in range(documents):
            length = 1 + number % 9 + (left if number == 0 else 0)
            rows.append({"text": " ".join(str(count + i) for i in range(length))})
            count, number = count + length, number + 1
        if kind == "parquet":
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(str(folder / f"part-{shard}.parquet"))
        else:
            with gzip.open(folder / f"part-{shard}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    assert count % SEQ_LEN == 0
    return count


def number_tokens(texts: list[str]) -> list[list[int]]:
    return [[int(word) for word in text.split()] for text in texts]


def numbered_stream(path: str, plan: BatchPlan, **options: Any) -> ShardStream:
    return ShardStream(source_of(path, streaming=True), number_tokens, SEQ_LEN, plan, **options)


def streamed_case(
    rank: int, world_size: int, *, path: str, buffer: int, batches: int, state: Any = None
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """This rank's part of some batches, begun at ``state``; and the state of all ranks behind them."""
    plan = BatchPlan(GLOBAL_BATCH, 1, world_size, rank)
    stream = numbered_stream(path, plan, buffer=buffer)
    if state is not None:
        stream.load_state_dict(state)
    found = [stream.next_batch() for _ in range(batches)]
    return found, merge_states(stream.exchange(stream.state_dict()))
