"""A process on gloo waits for its threads before the interpreter ends."""

from __future__ import annotations

import hashlib
import threading
import time

import torch
from torch import nn

from lorapre_dist import LoRAPre
from lorapre_dist.core import ending
from tests.distributed.harness import run_ranks

DATA = bytes(64 << 20)


def test_it_waits_for_a_thread_that_runs():
    done = []

    def work():
        hashlib.sha256(DATA).digest()  # without the interpreter's lock
        done.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    ending.wait_for_threads(limit=60.0)
    assert done


def test_it_waits_no_longer_than_the_limit_and_hardly_where_all_sleep():
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            hashlib.sha256(DATA[: 1 << 20]).digest()

    thread = threading.Thread(target=spin)
    thread.start()
    begun = time.monotonic()
    ending.wait_for_threads(limit=0.2)
    waited = time.monotonic() - begun
    stop.set()
    thread.join()
    assert 0.2 <= waited < 10.0
    begun = time.monotonic()
    ending.wait_for_threads(limit=60.0)
    assert time.monotonic() - begun < 10.0


def bound(rank, world_size):
    """Whether a process waits at its end once an optimizer has been bound."""
    optimizer = LoRAPre([("q_proj.weight", nn.Parameter(torch.ones(8, 8)))], lr=0.1, rank=2)
    optimizer.memory_report()
    return ending._register.cache_info().currsize


def test_a_rank_on_gloo_waits():
    assert run_ranks(2, bound) == [1, 1]
