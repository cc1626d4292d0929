from __future__ import annotations

import json

import pytest
import torch

from lorapre_dist import LoRAPre, LoRAPreConfig
from lorapre_dist.bench import gauges, training
from lorapre_dist.bench.__main__ import main
from lorapre_dist.config import ConfigError
from lorapre_dist.config.param_groups import param_groups

from .toy import Toy, assert_matches, train

TOY = {"lr": 0.01, "scale": 0.5}
OTHERS = [name for name in gauges.GAUGES if name != "orthonormal-A"]


def trained(name, steps=20, model=None, **options):
    """A model and its optimizer after some steps under a gauge."""
    model = model or Toy()
    optimizer = gauges.Gauged(model, LoRAPreConfig(**TOY, **options), gauges.GAUGES[name])
    train(model, optimizer, range(steps))
    return model, optimizer


@torch.no_grad()
def difference(model, other):
    others = dict(other.named_parameters())
    return max(float((p - others[name]).norm() / others[name].norm()) for name, p in model.named_parameters())


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 4, "rank_v": 2, "betas": (0.8, 0.95), "weight_decay": 0.1}])
def test_the_optimizers_own_gauge_is_the_optimizer(options):
    """With rank 4 one of the toy's matrices is too small, and goes to AdamW."""
    wanted = Toy()
    train(wanted, LoRAPre(wanted.named_parameters(), **TOY, **options))
    model, _ = trained("orthonormal-A", **options)
    assert_matches(model, wanted, 1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_gauges_differ_by_the_damping_alone(name):
    (own, _), (model, _) = (trained(x, steps=5, rank=2, residual=0.3) for x in ("orthonormal-A", name))
    assert 0 < difference(model, own) < 2e-3
    (own, _), (model, _) = (trained(x, rank=2, damping=1e-10) for x in ("orthonormal-A", name))
    assert difference(model, own) < 1e-7


def test_a_power_of_two_changes_no_bit():
    """Until the drift leaves the range of numbers, that is."""
    (model, drifting), (other, held) = (trained(name, rank=2) for name in ("none", "scalar"))
    assert difference(model, other) == 0
    for optimizer in (drifting, held):
        optimizer.sample()
    (free,), (scaled,) = drifting.samples, held.samples
    assert (free.cond_A, free.cond_B) == pytest.approx((scaled.cond_A, scaled.cond_B), rel=1e-9)
    assert free.largest_A > 10 * scaled.largest_A


def test_each_gauge_is_what_its_name_says():
    factors = {}
    for name in gauges.GAUGES:
        _, optimizer = trained(name, rank=2)
        factors[name] = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    eye = torch.eye(2, dtype=torch.float64)
    for state in factors["orthonormal-A"]:
        assert (state["m_A"] @ state["m_A"].T - eye).norm() < 0.01
    for state in factors["orthonormal-B"]:
        assert (state["m_B"].T @ state["m_B"] - eye).norm() < 0.01
    for state in factors["scalar"]:
        assert all(0.5 <= state[A].square().sum(1).mean() <= 2 for A in ("m_A", "v_A"))


def test_factors_that_overflow_end_the_run():
    model, optimizer = trained("none", steps=1, model=Toy(torch.float32), rank=2)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["m_A"].mul_(1e25)
    optimizer.sample()
    train(model, optimizer, range(1, 2))
    assert all(p.isnan().all() for p in optimizer.param_groups[0]["params"])
    optimizer.state[p]["m_A"].mul_(1e25)
    optimizer.sample()
    assert [sample.step for sample in optimizer.samples] == [1]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Three steps of two short sequences on a small text."""
    folder = tmp_path_factory.mktemp("gauges")
    texts = [" ".join(f"word{(7 * i + j) % 97}" for j in range(40)) + f" end of text {i}." for i in range(60)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = ["--steps", "3", "--batch", "2", "--seq_len", "16"]
    return [*sizes, "--dataset", str(corpus), "--data_cache", str(folder / "cache")]


def test_table_and_figures(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gauges, "EVERY", 2)
    path = tmp_path / "gauges.json"
    assert main(["gauges", *options, "--ranks", "4", "--eval_at", "2", "--json", str(path)]) == 0
    _, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == list(gauges.GAUGES)
    results = json.loads(path.read_text())["results"]
    for result, line in zip(results, lines, strict=True):
        run = result["run"]
        assert [sample["step"] for sample in result["samples"]] == [2, 3]
        assert result["step_ms"] > 0
        assert f"{run['val_loss']:.3f}" in line and f"{run['on_the_way']['2']:.3f}" in line
    # It is the training that other benches do: same weights, batches and lr.
    none, scalar, own, _ = (result["run"] for result in results)
    assert none["train_losses"] == scalar["train_losses"]
    args = gauges._parse(options)
    kept = training.Training(dataset=args.dataset, batch=args.batch, seq_len=args.seq_len)
    task = training.prepare(kept, args.steps, args.seed, args.data_cache)

    def build(model, lr):
        return LoRAPre(param_groups(model), lr=0.01, betas=training.BETAS, scale=lr / 0.01, rank=4)

    run = training.train("LoRAPre", build, gauges.MATRIX_LR, task)
    assert run.batches == own["batches"]
    assert run.train_losses == pytest.approx(own["train_losses"], rel=1e-5)
    assert run.val_loss == pytest.approx(own["val_loss"], rel=1e-5)


def test_bad_input_is_one_line(options, tmp_path):
    with pytest.raises(ConfigError, match="--ranks"):
        gauges.main([*options, "--ranks", "0"])
    with pytest.raises(ConfigError, match="rank must be below 128"):
        gauges.main([*options, "--ranks", "4", "500"])
    with pytest.raises(ConfigError, match="--json"):
        gauges.main([*options, "--json", str(tmp_path / "nowhere" / "x.json")])
