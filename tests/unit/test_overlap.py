"""``overlap`` in one process: its options, copies, memory, and the end of a process whose thread does not end."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from lorapre_dist import ConfigError
from lorapre_dist.config import CONFIGS
from lorapre_dist.core.background import Background
from lorapre_dist.optimizers import OPTIMIZERS

CPU = torch.device("cpu")


def trained(kind="LoRAPre", steps=4, dtype=torch.float32, **options):
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    parameters = [torch.nn.Parameter(torch.randn(24, 16, generator=one).to(dtype)) for one in generators]
    named = [(f"layers.{k}.q_proj.weight", p) for k, p in enumerate(parameters)]
    optimizer = OPTIMIZERS[kind](named, lr=1e-3, rank=4, **options)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return parameters, optimizer


PRINTED = [kind for kind in OPTIMIZERS if kind != "LoRAPreAdafactor"]  # which is not in the paper


@pytest.mark.parametrize("kind, variant", [*((k, "stable") for k in OPTIMIZERS), *((k, "paper") for k in PRINTED)])
def test_the_same_bits(kind, variant):
    options = {"variant": variant}
    plain, before = trained(kind, **options)
    overlapped, after = trained(kind, overlap=True, **options)
    assert all(torch.equal(p, q) for p, q in zip(plain, overlapped, strict=True))
    ours, theirs = after.factors(), before.factors()
    assert all(torch.equal(t, theirs[n][k]) for n, some in ours.items() for k, t in some.items())


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
def test_the_same_bits_in_16_bit_weights(weights):
    plain, before = trained(dtype=torch.bfloat16, weights=weights)
    overlapped, after = trained(dtype=torch.bfloat16, weights=weights, overlap=True)
    assert all(torch.equal(p, q) for p, q in zip(plain, overlapped, strict=True))
    ours, theirs = after.factors(), before.factors()
    assert all(torch.equal(t, theirs[n][k]) for n, some in ours.items() for k, t in some.items())


@pytest.mark.parametrize("other", [{"release_gradients": True}, {"state_dtype": "bf16"}])
def test_what_it_does_not_go_together_with(other):
    with pytest.raises(ConfigError, match=f"overlap=true with {next(iter(other))}"):
        trained(overlap=True, **other)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"overlap": "yes"}, "overlap='yes': must be true or false"),
        ({"overlap": True, "overlap_limit": -1}, "overlap_limit=-1: must be an integer of at least 0"),
        ({"overlap": True, "overlap_limit": 0.5}, "overlap_limit=0.5: must be an integer of at least 0"),
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_options(kind, options, text):
    with pytest.raises(ConfigError, match=text):
        CONFIGS[kind].from_params(options)


def test_memory_is_stated_and_can_be_refused():
    _, optimizer = trained(overlap=True)
    report = optimizer.memory_report()
    # Z of both moments: 4 + 1 rows of 16 columns of each of three matrices.
    assert report.overlap_bytes == 3 * 4 * 16 * (4 + 1)
    assert "kept by overlap" in str(report)
    assert trained()[1].memory_report().overlap_bytes == 0
    trained(overlap=True, overlap_limit=report.overlap_bytes)
    with pytest.raises(ConfigError, match=f"overlap_limit={report.overlap_bytes - 1}: raise that, lower rank"):
        trained(overlap=True, overlap_limit=report.overlap_bytes - 1)


def test_copies_share_the_order_of_work_and_pickles_do_not():
    parameters, optimizer = trained(overlap=True)
    for p in parameters:
        p.grad = None
    assert copy.deepcopy(optimizer)._background is optimizer._background
    again = pickle.loads(pickle.dumps(optimizer))
    assert again._background is not optimizer._background
    assert all(torch.equal(t, optimizer.factors()[n][k]) for n, s in again.factors().items() for k, t in s.items())


def test_it_can_be_switched_between_steps():
    plain, _ = trained(steps=6)
    parameters, optimizer = trained(steps=0)
    for step in range(6):
        optimizer.param_groups[0]["overlap"] = step % 3 > 0
        generator = torch.Generator().manual_seed(100 + step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, parameters, strict=True))


def test_work_is_done_in_order_and_only_what_is_asked_for_is_waited_for():
    background, gate, done = Background(), threading.Event(), []
    one, two = object(), object()
    background.run(lambda: done.append(1), [one], [], CPU)
    background.run(lambda: (gate.wait(), done.append(2)), [two], [], CPU)
    background.wait([one])
    assert done == [1]
    gate.set()
    background.wait()
    assert done == [1, 2]


def test_nothing_is_done_after_a_failure():
    background, done = Background(), []

    def fail():
        raise RuntimeError("a rank is lost")

    background.run(fail, [], [], CPU)
    background.run(lambda: done.append(1), [], [], CPU)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a rank is lost"):
            background.wait()
    assert not done


STUCK = """
import threading, torch
from lorapre_dist import LoRAPre
from lorapre_dist.core import background
background.ENDING = 0.5
p = torch.nn.Parameter(torch.randn(24, 16))
optimizer = LoRAPre([("q_proj.weight", p)], lr=1e-3, rank=4, overlap=True)
p.grad = torch.randn_like(p)
optimizer.step()
optimizer._background.run(threading.Event().wait, [], [], p.device)
raise SystemExit(3)
"""


@pytest.mark.slow
def test_a_process_ends_though_its_thread_does_not():
    """As where a peer is gone and a collective still waits for it."""
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (3, "")
