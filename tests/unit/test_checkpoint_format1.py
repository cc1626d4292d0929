"""Checkpoints of before the gauge, in ``tests/data/format1``: factors 1e18 apart, and some that are not finite.

Version 0.1.0 wrote them on one process, after 1,400 and 3,000 steps of noise on a 12 x 20 matrix at rank 3.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from lorapre_dist import ConfigError, checkpoint
from lorapre_dist.checkpoint import dcp, newest_whole
from lorapre_dist.checkpoint.folder import CheckpointError
from lorapre_dist.cli import main as lorapre
from lorapre_dist.optimizers import OPTIMIZERS

DATA = Path(__file__).parents[1] / "data" / "format1"
NAMES = ["LoRAPre", "LoRAPreAdafactor"]
WEIGHT = "q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA, tmp_path / "format1"))


def fresh(name):
    model = nn.ModuleDict({"q_proj": nn.Linear(20, 12)})
    return model, OPTIMIZERS[name](model.named_parameters(), lr=1e-4, rank=3)


def stored(path):
    tensors = path / "tensors"
    return {name: dcp.whole(tensors, name, entry) for name, entry in dcp.shapes(tensors).items()}


def assert_loaded(optimizer, saved):
    """The product, in the gauge; roots where there were squares."""
    found = optimizer.factors()[WEIGHT]
    for moment in {key[0] for key in found if key.endswith("_A")}:
        B, A = (saved[f"optimizer.{WEIGHT}.{moment}_{factor}"].double() for factor in "BA")
        product = found[f"{moment}_B"].double() @ found[f"{moment}_A"].double()
        assert (product - B @ A).norm() <= 1e-5 * (B @ A).norm()
        eye = torch.eye(len(A))
        torch.testing.assert_close(found[f"{moment}_A"] @ found[f"{moment}_A"].T, eye, rtol=0, atol=1e-5)
    for root, square in (("rms_row", "v_row"), ("rms_col", "v_col")):
        if root in found:
            torch.testing.assert_close(found[root].square(), saved[f"optimizer.{WEIGHT}.{square}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_factors_that_are_far_apart_are_brought_into_the_gauge(name, folder, exhaustive):
    path = folder / name / "step1400"
    saved = stored(path)
    assert saved[f"optimizer.{WEIGHT}.m_A"].norm() > 1e18 and saved[f"optimizer.{WEIGHT}.m_B"].norm() < 1e-16
    model, optimizer = fresh(name)
    checkpoint.load(model, optimizer, folder / name, "step1400")
    assert_loaded(optimizer, saved)
    assert torch.equal(model["q_proj"].weight.detach().reshape(-1), saved[f"model.{WEIGHT}"])
    assert {bound.state.step for bound in optimizer.bound()} == {1400}
    steps = 2500 if exhaustive or name == "LoRAPre" else 200
    for _ in range(steps):  # where it died before
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in optimizer.factors()[WEIGHT].values())
    checkpoint.save(model, optimizer, folder / name, "later", step=1400 + steps)
    other, resumed = fresh(name)
    checkpoint.load(other, resumed, folder / name, "later")
    assert all(torch.equal(t, resumed.factors()[WEIGHT][k]) for k, t in optimizer.factors()[WEIGHT].items())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_and_passed_over(name, folder, capsys):
    model, optimizer = fresh(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    words = rf"optimizer.{WEIGHT}.m_A is not finite.*; the newest one that can be used is 'step1400'"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(model, optimizer, folder / name)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    path, complaints = newest_whole(folder / name)
    assert path == folder / name / "step1400" and "m_A is not finite" in complaints[0]
    lorapre(["inspect", str(folder / name)])
    table = capsys.readouterr().out
    assert "is not finite" in table and table.count("whole") == 1


def test_rank_can_change_on_the_way(folder):
    model = nn.ModuleDict({"q_proj": nn.Linear(20, 12)})
    for rank in (2, 5):
        optimizer = OPTIMIZERS["LoRAPre"](model.named_parameters(), rank=rank, rank_v=1)
        checkpoint.load(model, optimizer, folder / "LoRAPre", "step1400", resize_rank=True)
        A = optimizer.factors()[WEIGHT]["m_A"]
        torch.testing.assert_close(A @ A.T, torch.eye(rank), rtol=0, atol=1e-5)


def test_the_old_one_can_still_be_consolidated(folder, tmp_path):
    target = tmp_path / "whole"
    assert lorapre(["consolidate", str(folder / "LoRAPre" / "step1400"), str(target)]) == 0
    assert any(target.iterdir())


@pytest.mark.parametrize("door", ["full", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_before_is_loaded_the_same_way(name, door, folder):
    saved = stored(folder / name / "step1400")
    prefix = f"optimizer.{WEIGHT}."
    old = {key.removeprefix(prefix): t for key, t in saved.items() if key.startswith(prefix)}
    _, optimizer = fresh(name)
    bias = {"exp_avg": torch.zeros(12), "exp_avg_sq": torch.zeros(12)}

    def load(matrix):
        if door == "full":
            optimizer.load_full_state_dict({WEIGHT: {**matrix, "step": 1400}, "q_proj.bias": {**bias, "step": 1400}})
            return
        state = optimizer.state_dict()
        state["state"][0] = {**matrix, "step": torch.tensor([1400])}
        optimizer.load_state_dict(state)

    bad = {**old, "m_B": old["m_B"].clone()}
    bad["m_B"][2, 1] = float("nan")
    with pytest.raises(ConfigError, match="m_B is not finite"):
        load(bad)
    load(old)
    assert_loaded(optimizer, saved)
