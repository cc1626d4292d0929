from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.engines.schedule import lr_fraction, scheduler_factory
from lorapre_dist.training.run.evaluation import Evaluation, sequence_losses
from lorapre_dist.training.run.metrics import MetricsWriter, keep_until, read_rows
from lorapre_dist.training.run.plots import plot_loss, running_mean


def test_schedule_warms_up_and_decays_to_a_tenth():
    fractions = [lr_fraction(step, 10, 100) for step in range(101)]
    assert fractions[0] == 0.1
    assert fractions[9] == 1.0
    assert fractions[10] == 1.0
    assert fractions[55] == pytest.approx(0.55)  # half-way down
    assert fractions[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(fractions[10:]))
    assert lr_fraction(500, 10, 100) == pytest.approx(0.1)
    assert lr_fraction(0, 0, 1) == 1.0


def test_schedule_applies_to_every_group_in_proportion():
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.1}])
    scheduler = scheduler_factory(4, 40)(optimizer)
    assert scheduler.get_last_lr() == pytest.approx([0.25, 0.025])
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.5, 0.05])


def test_resuming_drops_later_rows_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": float(i)}) + "\n" for i in range(6)) + '{"step": 6, "lo')
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4, 5]
    keep_until(path, 3)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


def test_writer_continues_and_starts_afresh(make_settings, tmp_path):
    settings = make_settings("--output_dir", str(tmp_path))
    for resumed, steps, kept in ((0, [0, 1, 2, 3], [0, 1, 2, 3]), (2, [3, 4], [0, 1, 2, 3, 4]), (0, [0, 1], [0, 1])):
        writer = MetricsWriter(settings, resumed)
        for step in steps:
            writer.write({"step": step, "loss": None if step == 0 else 1.0, "eval_ppl": math.inf})
        writer.close()
        assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == kept
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_plot_is_written_for_any_rows(tmp_path):
    rows = [{"step": 0, "loss": None, "eval_loss": 7.0}] + [{"step": i, "loss": 7.0 / i} for i in range(1, 9)]
    for name, part in (("all", rows), ("none", []), ("first", rows[:1])):
        plot_loss(part, tmp_path / f"{name}.png", "title")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_running_mean_does_not_lag():
    assert running_mean([]) == []
    assert running_mean([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    falling = [7.6 - 0.01 * k for k in range(400)]
    assert running_mean(falling) == pytest.approx(falling)
    curve = [3.8 + 3.8 * math.exp(-k / 60) for k in range(800)]  # the quick start's
    assert max(abs(a - b) for a, b in zip(curve, running_mean(curve), strict=True)) < 0.05
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    assert max(map(abs, running_mean(noise)[100:-100])) < 0.7  # of 41 values each


def test_steps_are_whole_on_the_plot(tmp_path, monkeypatch):
    ticks = []

    def saved(figure, path, **_):
        ticks.extend(figure.axes[0].get_xticks())
        path.write_bytes(b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", saved)
    plot_loss([{"step": step, "loss": 7.0} for step in range(1, 4)], tmp_path / "loss.png", "title")
    assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)


def test_evaluation_counts_next_token_losses_only():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(15).view(3, 5) % 11
    expected = [
        -sum(torch.log_softmax(logits[b, i].double(), 0)[tokens[b, i + 1]].item() for i in range(4)) for b in range(3)
    ]
    # fp32 log-softmax, summed in fp64.
    assert sequence_losses(logits, tokens).tolist() == pytest.approx(expected, rel=1e-6)
    assert Evaluation(2.0).perplexity == pytest.approx(math.exp(2.0))
    assert Evaluation(1e4).perplexity == math.inf


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [1, 3, 10, 23])
def test_evaluation_shares_cover_everything_once(world, total):
    shares = [BatchPlan(world, 1, world, rank).share(total) for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) == -(-total // world)
