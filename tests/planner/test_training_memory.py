"""The peak of live tensor bytes in real training steps is the plan's, within 5%: each option, and all of them."""

from __future__ import annotations

import pytest

from lorapre_dist.bench.__main__ import main
from lorapre_dist.bench.training_memory import OPTIONS, Case, measured, planned
from lorapre_dist.planner import MOMENTS


@pytest.mark.parametrize("name", ["none", "checkpointing", "kahan", "low-rank embeddings", "all"])
def test_a_step_of_60m_takes_what_is_planned(name):
    """Counted on the device meta. The plan's workspace is a bound: that of a small model is a larger part of all."""
    case = Case("llama-60m", 64, options=OPTIONS[name], device="meta")
    found, said = measured(case), planned(case)
    for moment in ("forward", "backward")[: 1 if "release_gradients" in case.options else 2]:
        assert 0.99 * found[moment] <= said[moment] <= 1.02 * found[moment], moment
    assert max(found.values()) <= 1.001 * max(said.values())
    assert max(said.values()) <= (1.2 if name == "all" else 1.05) * max(found.values())


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
