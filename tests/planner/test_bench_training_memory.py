"""The peak of live tensor bytes in real training steps is what ``lorapre plan`` says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lorapre_dist.bench.__main__ import main
from lorapre_dist.bench.training_memory import OPTIONS, Case, measured, planned
from lorapre_dist.planner import MOMENTS

RECORDED = Path(__file__).parents[2] / "docs" / "results" / "data" / "training_memory.csv"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "checkpointing", "kahan", "low-rank embeddings", "all"])
def test_forward_and_backward_take_what_is_planned(name):
    """The plan's workspace of a step is a bound, which outweighs so small a model."""
    case = Case("llama-tiny", 16, options=OPTIONS[name], device="meta")
    found, said = measured(case), planned(case)
    for moment in ("forward", "backward")[: 1 if "release_gradients" in case.options else 2]:
        assert 0.99 * found[moment] <= said[moment] <= 1.03 * found[moment], moment
    assert max(found.values()) <= max(said.values())


@pytest.mark.slow
def test_the_peak_of_60m_is_planned_within_5_percent():
    case = Case("llama-60m", 64, options=OPTIONS["low-rank embeddings"], device="meta")
    peak = max(measured(case).values())
    assert peak <= max(planned(case).values()) <= 1.05 * peak


def test_meta_counts_what_a_cpu_takes():
    cases = [Case("llama-tiny", 16, options=OPTIONS["stochastic"], device=device) for device in ("cpu", "meta")]
    cpu, meta = map(measured, cases)
    for moment in MOMENTS:
        assert meta[moment] == pytest.approx(cpu[moment], rel=0.01), moment


def test_the_bench_prints_both_and_refuses_what_is_no_model(capsys, tmp_path, monkeypatch):
    from lorapre_dist.bench import training_memory

    monkeypatch.setattr(training_memory, "OPTIONS", {"none": {}})
    arguments = ["memory", "--parts", "training", "--models", "llama-tiny:16", "--csv", str(tmp_path / "m.csv")]
    assert main(arguments) == 0
    assert "planned / measured" in capsys.readouterr().out
    assert (tmp_path / "m.csv").read_text().startswith("model,rank,layout,")
    assert main(["memory", "--parts", "training", "--models", "llama-tiny"]) == 2
    assert "must be a preset and a rank" in capsys.readouterr().err


def test_what_was_measured_is_within_5_percent_of_the_plan():
    """Of the recorded table, under every layout and option in it."""
    with RECORDED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["layout"] for row in rows} >= {"one device", "zero2", "zero3", "fsdp2"}
    for row in rows:
        layout, ranks = row["layout"].replace("one device", "ddp"), int(row["ranks"])
        case = Case(row["model"], int(row["rank"]), layout, OPTIONS[row["options"]], device=row["device"])
        said = max(max(planned(case, ranks, rank).values()) for rank in range(ranks)) / 2**20
        assert float(row["measured"].removesuffix(" MiB")) == pytest.approx(said, rel=0.05), row
