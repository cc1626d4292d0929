"""memory_report against hand computation, and its workspace against what a step really allocates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorapre_dist import LoRAPre

from .toy import STABLE, Toy, state_tensors

# memory_report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)])
def test_memory_report_by_hand(dtype, size):
    report = LoRAPre(Toy(dtype).named_parameters(), rank=4, rank_v=2).memory_report()
    matrices = [(12, 8), (8, 17), (8, 6)]
    elements = sum(p * q for p, q in matrices)
    total = sum(p.numel() for p in Toy().parameters())
    state = sum((p + q) * (4 + 2) + p for p, q in matrices) + 2 * (total - elements)
    assert (report.matrices, report.matrix_elements) == (3, elements)
    assert report.adamw_parameters == len(list(Toy().parameters())) - 3
    assert report.adamw_elements == total - elements
    assert report.state_bytes == size * state
    assert report.adamw_state_bytes == size * 2 * total
    assert (report.layout, report.world_size) == ("one device", 1)
    assert report.state_bytes == sum(
        t.numel() * t.element_size()
        for t in state_tensors(LoRAPre(Toy(dtype).named_parameters(), rank=4, rank_v=2)).values()
    )


def test_memory_report_of_paper_has_no_row_energies():
    stable = LoRAPre(Toy().named_parameters(), rank=4, rank_v=4).memory_report()
    paper = LoRAPre(Toy().named_parameters(), rank=4, rank_v=4, variant="paper").memory_report()
    assert stable.state_bytes - paper.state_bytes == 8 * (12 + 8 + 8)


def test_memory_report_reads_well():
    text = str(LoRAPre(Toy().named_parameters(), **STABLE).memory_report())
    assert "one device, state over 1 rank" in text
    assert "3 (280 elements)" in text
    assert len({line.index(line.split("  ")[-1].strip()) for line in text.splitlines()}) <= 2


def test_workspace_does_not_grow_with_the_rows():
    def workspace(p):
        return LoRAPre([("q_proj", nn.Parameter(torch.empty(p, 1024, device="meta")))], rank=32).memory_report()

    assert workspace(2**18).workspace_bytes == workspace(2**20).workspace_bytes
    assert workspace(2**20).workspace_bytes < 256 * 2**20


def bound_and_peak(build):
    """What the optimizer of ``build()`` reports as its step's workspace, and the most bytes that the first step held.

    By PyTorch's own account, beyond what was held before the step.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer = build()
        bound = optimizer.memory_report().workspace_bytes
        with torch.profiler.record_function("the step"):
            optimizer.step()
    events = profile.profiler.kineto_results.events()
    (begin,) = (e.start_ns() for e in events if e.name() == "the step")
    held = before = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        if event.start_ns() < begin:
            before = held
        else:
            peak = max(peak, held - before)
    assert peak > 0
    return bound, peak


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1024, 1376)], {"rank": 64}),
        ([(300, 200)] * 12, {"rank": 64, "rank_v": 64}),  # many small matrices in one bucket
        ([(130, 131)] * 60, {"rank": 128, "rank_v": 128}),  # their Grams outweigh their factors
        ([(64, 4000), (4000, 64)], {"rank": 16}),
        ([(512, 512)] * 3, {"rank": 32, "variant": "paper"}),
        ([(100, 60, 80)], {"rank": 8}),  # experts: stacked, without a copy
        ([(80, 60)] * 100, {"rank": 50, "rank_v": 50}),  # stacked, with copies
    ],
    ids=["large", "many", "grams", "thin", "paper", "experts", "stacks"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_bounds_what_a_step_allocates(shapes, options, dtype):
    named = [(f"{i}.experts.q_proj", nn.Parameter(torch.zeros(shape, dtype=dtype))) for i, shape in enumerate(shapes)]
    for _, p in named:
        p.grad = torch.randn(p.shape).to(dtype)
    bound, peak = bound_and_peak(lambda: LoRAPre(named, **options))
    assert peak <= bound, f"{peak / 2**20:.2f} MiB, bound {bound / 2**20:.2f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_bounds_what_a_step_of_a_large_embedding_allocates(dtype):
    shapes = {"embed": (8192, 512), "q_proj": (64, 64)}
    named = [(name, nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in shapes.items()]
    for _, p in named:
        p.grad = torch.ones_like(p)
    bound, peak = bound_and_peak(lambda: LoRAPre(named, rank=4))
    assert peak <= bound
