"""What a newcomer writes first: the model itself, parameters without names, AdamW's lr, one that is far too small."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, LoRAPreAdafactor
from lorapre_dist.optimizers import OPTIMIZERS

from .toy import STABLE, Toy, assert_same, train


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj, self.lookup = nn.Linear(8, 12), nn.Embedding(9, 8)


class Net(nn.Module):
    """An embedding, two blocks with one of their own in each, and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40)
        self.layers = nn.ModuleList([Block(), Block()])


LOW_RANK = {"layers.0.in_proj.weight", "layers.1.in_proj.weight"}


def quiet(make):
    """What ``make`` gives, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_model_itself_is_what_every_optimizer_takes(name):
    options = {"rank": 4, "lr": 0.01}
    optimizer = quiet(lambda: OPTIMIZERS[name](Net(), **options))
    assert quiet(lambda: set(optimizer.factors())) == LOW_RANK
    assert set(copy.deepcopy(OPTIMIZERS[name](Net(), **options)).factors()) == LOW_RANK
    # The names alone do not tell that a lookup is one.
    by_name = OPTIMIZERS[name](Net().named_parameters(), **options)
    assert set(by_name.factors()) == LOW_RANK | {f"layers.{k}.lookup.weight" for k in (0, 1)}
    chosen = OPTIMIZERS[name](Net(), **options, target_modules=["lookup"])
    assert set(chosen.factors()) == {f"layers.{k}.lookup.weight" for k in (0, 1)}


def test_the_model_and_its_named_parameters_train_alike():
    model, other = Toy(), Toy()
    train(model, LoRAPre(model, **STABLE), range(3))
    optimizer = LoRAPre(other.named_parameters(), **STABLE)
    train(other, optimizer, range(3))
    assert_same(model, other)
    with pytest.raises(ConfigError, match="learn_types: must come before the first step"):
        optimizer.learn_types(other)


def test_groups_learn_the_types_of_the_model():
    model = Net()
    optimizer = LoRAPre([{"params": list(model.named_parameters())}], rank=4)
    optimizer.learn_types(model)
    assert set(optimizer.factors()) == LOW_RANK == optimizer.low_rank_names(model)


def test_parameters_without_names_are_warned_of():
    optimizer = quiet(lambda: LoRAPre(Net().parameters(), rank=4))  # DeepSpeed's engine may still name them
    with pytest.warns(UserWarning, match=r"no names, so all 6 matrices .* 40 x 8, .*; LoRAPre\(model, \.\.\.\) leaves"):
        assert len(optimizer.factors()) == 6
    matrices = [p for n, p in Net().named_parameters() if n in LOW_RANK]
    rest = [p for n, p in Net().named_parameters() if n not in LOW_RANK]
    chosen = LoRAPre([{"params": matrices}, {"params": rest, "rank": 0}], rank=4)
    assert len(quiet(chosen.factors)) == 2


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("LoRAPre", {"lr": 5e-5}, r"lr=5e-05 times scale=0\.25: .*as AdamW at lr 1\.3e-05; scale=1 takes AdamW's lr"),
        ("LoRAPre", {"lr": 5e-5, "scale": 1.0}, None),
        ("LoRAPre", {"lr": 0.0}, None),  # a warm-up by hand
        ("LoRAPre", {"lr": 2e-4}, None),
        ("LoRAPreAdafactor", {"lr": 5e-5}, "lr=5e-05 times scale"),
        ("LoRAPreMuon", {"lr": 5e-5}, "lr=5e-05: steps of matrices are so small"),
        ("LoRAPreMuon", {"lr": 5e-5, "adjust_lr_fn": "match_rms_adamw"}, None),
        ("LoRAPreLion", {"lr": 5e-5}, None),
        ("LoRAPreLion", {"lr": 1e-6}, "lr=1e-06: "),
        ("LoRAPreSGD", {"lr": 1e-6}, None),
    ],
)
def test_a_learning_rate_that_learns_nothing_is_warned_of(name, options, words):
    def make():
        return OPTIMIZERS[name](Net(), rank=4, **options)

    if words is None:
        quiet(make)
        return
    with pytest.warns(UserWarning, match=words):
        make()


def moved(make, signal):
    """How far elements go in one step, and in 40: root mean squares over ``lr``. Rank 3 by ``signal``, noise of 1."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 3, generator=generator), torch.randn(3, 96, generator=generator)
    weight, way = nn.Parameter(torch.zeros(64, 96)), []
    optimizer = make([("layers.0.in_proj.weight", weight)])
    for _ in range(60):
        weight.grad = signal * (left @ right) / 3**0.5 + torch.randn(64, 96, generator=generator)
        optimizer.step()
        way.append(weight.detach().clone())
    steps = torch.stack(way[20:]) - torch.stack(way[19:-1])
    return [float(change.square().mean().sqrt()) / 1e-3 for change in (steps, way[-1] - way[19])]


@pytest.mark.parametrize("signal", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("cls", [LoRAPre, LoRAPreAdafactor])
def test_from_adamw_goes_as_far_as_adamw(cls, signal):
    """A gradient weighs 1 in the sum of all updates, outside the subspace at once: single steps of noise are larger."""
    step, way = moved(lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-3, weight_decay=0.0), signal)
    ours, far = moved(lambda named: cls.from_adamw(named, lr=1e-3, weight_decay=0.0, rank=8), signal)
    quarter, _ = moved(lambda named: cls(named, lr=1e-3, rank=8), signal)
    less, _ = moved(lambda named: cls.from_adamw(named, lr=1e-3, weight_decay=0.0, rank=8, residual=0.3), signal)
    assert 0.9 < less / step < 1.8
    assert 0.9 < far / way < 1.2
    assert 1.1 < ours / step < 4.2
    assert quarter == pytest.approx(ours / 4, rel=1e-3)


def test_from_adamw_has_adamws_arguments_and_defaults():
    ours, theirs = LoRAPre.from_adamw(Net(), rank=4), torch.optim.AdamW(Net().parameters())
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert ours.param_groups[0][key] == theirs.param_groups[0][key]
    given = LoRAPre.from_adamw(Net(), 2e-3, (0.8, 0.9), 1e-6, 0.1, rank=4, scale=0.5).param_groups[0]
    assert [given[k] for k in ("lr", "betas", "eps", "weight_decay", "scale")] == [2e-3, (0.8, 0.9), 1e-6, 0.1, 0.5]
