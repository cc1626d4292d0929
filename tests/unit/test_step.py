"""What a step costs: nothing waits for the device, few operations, and no Gram is solved by two ranks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import lorapre_dist
from lorapre_dist.bench import launches, scaling
from lorapre_dist.core import batching, refresh
from lorapre_dist.core.batching import Limits, Outline
from lorapre_dist.optimizers import OPTIMIZERS, binding, momentum
from tests.shapes import projections

MODEL = "llama-60m"
MATRICES = len(projections(MODEL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_number_is_read_back_and_all_is_on_one_device(kind, size, dtype):
    """On the device that has no numbers: reading one raises, by whatever name."""
    with scaling.fake_world(size, 0):
        found = launches.count(lambda: launches.ours(kind, MODEL, 128, size, dtype))
    assert found.total > 100
    assert found.waits == 0 and not found.mixed


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nor_by_matrices(kind):
    with scaling.fake_world(8, 3):
        found = launches.count(lambda: launches.ours(kind, MODEL, 128, 8, torch.bfloat16, work="matrices"))
    assert found.total > 100
    assert found.waits == 0 and not found.mixed


@pytest.mark.parametrize("variant", ["stable", "paper"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nor_with_overlap(kind, variant):
    """Queued on a stream all of it, with collectives on groups of its own."""
    with scaling.fake_world(4, 0):
        model, few = "llama-60m", {"overlap": True, "variant": variant}
        found = launches.count(lambda: launches.ours(kind, model, 16, 4, torch.float32, **few))
    assert found.total > 100
    assert found.waits == 0 and not found.mixed


def with_rate(kind, rate, device):
    """An optimizer of a matrix and a vector, whose groups have this ``lr``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.q_proj.weight": (24, 40), "norm.weight": (24,)}
    drawn = {name: torch.randn(2, *shape, generator=generator).to(device) for name, shape in shapes.items()}
    named = [(name, torch.nn.Parameter(x[0])) for name, x in drawn.items()]
    for (_, p), x in zip(named, drawn.values(), strict=True):
        p.grad = x[1] * 1e-3
    optimizer = OPTIMIZERS[kind](named, rank=4, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_learning_rate_on_the_device_is_not_read_back(kind, monkeypatch):
    """As a CUDA graph needs it, which takes the rate that lies there when it is replayed; it counts as a number."""
    rate = torch.tensor(0.01, device="meta")
    found = launches.count(lambda: with_rate(kind, rate, "meta"))
    assert found.waits == 0 and not found.mixed
    for module in (binding, momentum):
        monkeypatch.setattr(module, "stays_on_device", lambda lr: isinstance(lr, torch.Tensor))
    stepped = [with_rate(kind, rate, "cpu") for rate in (0.01, torch.tensor(0.01))]
    for optimizer in stepped:
        optimizer.step()
        assert len(optimizer.param_groups[0]["params"]) == 2
    for one, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in stepped), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_no_number_is_assigned_to_elements():
    """``x[k] = 0.0`` copies it from the host, which waits for that on a GPU; a device without numbers says nothing."""
    found = []
    for package in ("core", "optimizers"):
        for path in sorted((Path(lorapre_dist.__file__).parent / package).rglob("*.py")):
            if path.name == "agreement.py":  # no part of a step
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Assign) and any(isinstance(target, ast.Subscript) for target in node.targets):
                    value = node.value.operand if isinstance(node.value, ast.UnaryOp) else node.value
                    if isinstance(value, ast.Constant) and type(value.value) in (int, float):
                        found.append(f"{path.name}:{node.lineno}")
    assert not found


def test_what_is_looked_for_is_seen():
    """A read of a number raises on that device, and one on another device is counted."""
    x = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError):
        x.sum().item()
    with launches.Launches() as found, pytest.raises((RuntimeError, NotImplementedError)):
        bool((x > 0).any())
    assert found.waits == 1
    with launches.Launches() as found:
        x.add(2.0)
        torch.where(x > 0, x, torch.ones(()))
        assert not found.mixed
        x.copy_(torch.ones(3))
    assert found.mixed


@pytest.mark.parametrize(
    ("kind", "size", "most"),
    [("LoRAPre", 1, 12), ("LoRAPreMuon", 1, 20), ("LoRAPreAdafactor", 1, 12), ("LoRAPre", 8, 16)],
)
def test_operations_a_matrix(kind, size, most):
    with scaling.fake_world(size, 0):
        found = launches.count(lambda: launches.ours(kind, MODEL, 128, size))
    assert found.total / MATRICES <= most


def solved(monkeypatch, size, index, layers=2):
    """Sides of the Grams that a rank factors in a step."""
    sides = []
    cholesky = refresh.damped_cholesky

    def counting(grams, *rest, **settings):
        sides.extend([grams.shape[-1]] * len(grams))
        return cholesky(grams, *rest, **settings)

    with scaling.fake_world(size, index):
        optimizer = scaling.row_shards("LoRAPre", projections(MODEL)[: 7 * layers], 16, size, index)
        with monkeypatch.context() as patch:
            patch.setattr(refresh, "damped_cholesky", counting)
            optimizer.step()
    return sides


@pytest.mark.parametrize("size", [2, 4, 16, 40])
def test_no_gram_is_solved_twice(monkeypatch, size):
    """Fourteen matrices, each with a Gram of B and one of A for both moments; also on more ranks than there are."""
    sides = [solved(monkeypatch, size, index) for index in range(size)]
    every = sorted(side for some in sides for side in some)
    assert every == sorted([16, 2] * 2 * 14)
    most = max(len(some) for some in sides)
    assert most == 4 * -(-14 // size)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("number", [1, 2, 7, 8, 9, 64, 100])
def test_owners_have_each_gram_once(number, ranks):
    parts = [batching.owned(number, ranks, index) for index in range(ranks)]
    assert [k for low, high in parts for k in range(low, high)] == list(range(number))
    assert batching.evenly_dealt([number], ranks) == (-(-number // ranks) * ranks <= 2 * number)


# what goes together ---------------------------------------------------------------------------------------------


def outline(parts=1, turn=0, before=(0, 0, 0), shape=(64, 32), alike=None, rows=None):
    return Outline(
        shape=shape,
        rows=shape[0] if rows is None else rows,
        ranks=(8, 1),
        statistics=0,
        itemsize=4,
        parts=parts,
        lends=parts == 1,
        largest=4 * shape[0] * shape[1] // parts,
        alike=(shape, parts) if alike is None else alike,
        turn=turn,
        before=before,
    )


def test_shared_matrices_come_first_and_neighbours_in_turns():
    """Rank 1 of a flat buffer in four parts: its own, one shared with rank 0, one with rank 2."""
    mine = [outline(2, turn=0, alike="with 0"), *[outline()] * 3, outline(2, turn=1, alike="with 2")]
    waves = list(batching.plan(mine, Limits(1 << 30, 1, 8)))
    assert waves[:2] == [[[[0]]], [[[4]]]]
    assert sorted(k for bucket in waves[2] for run in bucket for k in run) == [1, 2, 3]


@pytest.mark.parametrize("bucket", [1, 5_000, 20_000, 1 << 30])
def test_peers_find_the_same_buckets_whatever_else_they_hold(bucket):
    ahead = [(k, 32 * k, 0) for k in range(12)]
    shared = [outline(4, before=place, alike=("x", k % 2)) for k, place in enumerate(ahead)]
    names = [f"shared {k}" for k in range(12)]

    def found(every):
        limits = Limits(bucket, 1 << 20, 2)
        waves = batching.plan([one for one, _ in every], limits)
        named = [[[[every[k][1] for k in run] for run in bucket] for bucket in wave] for wave in waves]
        kept = [[[run for run in bucket if run[0] in names] for bucket in wave] for wave in named]
        return [[bucket for bucket in wave if bucket] for wave in kept if any(wave)]

    plain = list(zip(shared, names, strict=True))
    mixed = [pair for k, one in enumerate(plain) for pair in [(outline(), f"own {k}")] * (k % 3) + [one]]
    assert found(plain) == found(mixed)
    assert [n for wave in found(plain) for b in wave for run in b for n in run].sort() == names.sort()
    if bucket == 1:
        assert all(len(run) == 1 for wave in found(plain) for b in wave for run in b)


def test_a_wave_keeps_no_more_than_a_bucket_holds():
    many = [outline(before=(k, 32 * k, 0)) for k in range(50)]
    limits = Limits(20_000, 1, 8)
    waves = list(batching.plan(many, limits))
    assert len(waves) > 1
    for wave in waves:
        kept = sum(many[k].bytes(32, 5) for bucket in wave for run in bucket for k in run)
        assert kept <= 2 * limits.bucket


# benches --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_neighbours_do_not_wait_in_a_chain():
    """Four ranks with eleven row blocks each: all of them work at once."""
    results = scaling.spawn(4, scaling.chained, delay=0.15)
    own = max(result["own"] for result in results)
    assert own >= 1.5
    # A chain takes twice as long and more; what is left is for a busy machine.
    assert min(result["wall"] for result in results) <= 1.6 * own


@pytest.mark.slow
def test_bench_scaling_and_launches_print_their_tables(capsys):
    few = ["--layers", "1", "--worlds", "1", "2", "--repeats", "1", "--rank", "8", "--parts", "simulate"]
    scaling.main(few)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:-4] for line in lines[-3:]] == [["1"], ["rows", "2"], ["matrices", "2"]]
    assert 0 < float(lines[-1].split()[4]) < 1.2
    launches.main(["--rank", "8", "--operations"])
    out = capsys.readouterr().out
    assert all(kind in out for kind in OPTIMIZERS) and "row shards, 8 ranks" in out
