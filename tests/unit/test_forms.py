"""Factors that are kept in bf16 or in 8 bits between steps: quantized, sizes, saving, and what a step holds."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lorapre_dist import LoRAPre, checkpoint
from lorapre_dist.config import ConfigError
from lorapre_dist.core import noise, quantized
from lorapre_dist.optimizers import OPTIMIZERS

from .test_report import bound_and_peak
from .toy import STABLE, Toy, assert_same, loss_of, state_tensors, train

FORMS = ["bf16", "8bit"]
BITS = {"bf16": 2, "8bit": 1}


def bits_of(begin, first, count, r, dim):
    return quantized.random_bits(torch.tensor([[begin, -begin]], dtype=torch.int32), first, count, r, dim)


# rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_rounding_is_right_on_average(form, dim):
    """The mean of n roundings is within 5 standard errors of what was rounded, whose spread is at most its spacing."""
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(1))
    count, n = x.shape[-3 - dim], 4000
    kept = [quantized.rounded(x, form, dim, bits_of(k, 0, count, x.shape[dim], dim)) for k in range(n)]
    wide = torch.stack([quantized.widened(one, dim, torch.float64) for one in kept])
    spacing = x.abs() * 2.0**-7 if form == "bf16" else x.abs().amax(dim, keepdim=True) / 127
    assert ((wide - x).abs() <= spacing * (1 + 1e-6)).all()
    assert ((wide.mean(0) - x).abs() <= 5 * spacing / 2 / n**0.5).all()
    assert len({bytes(one.view(torch.uint8).numpy().tobytes()) for one in kept}) > n // 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_any_part_of_the_vectors_is_rounded_as_in_the_whole(form, dim):
    x = torch.randn(1, 12, 10, generator=torch.Generator().manual_seed(2))
    across, r = -3 - dim, x.shape[dim]
    whole = quantized.rounded(x, form, dim, bits_of(7, 0, x.shape[across], r, dim))
    for low, high in ((0, 3), (3, 4), (4, x.shape[across])):
        part = x.narrow(across, low, high - low)
        found = quantized.rounded(part, form, dim, bits_of(7, low, high - low, r, dim))
        assert torch.equal(found, whole.narrow(across, low, high - low))


@pytest.mark.parametrize("form", FORMS)
def test_what_can_be_kept_is_kept(form):
    x = torch.tensor([[[0.0, 0, 0], [127, -3, 5], [-1, 127, 0]]])
    for bits in (None, bits_of(3, 0, 3, 3, -1)):
        assert torch.equal(quantized.widened(quantized.rounded(x, form, -1, bits), -1, torch.float32), x)


def test_random_bits_are_even_and_nothing_shares_them():
    """Each of 32, and of both halves, within 5 standard errors; parameters, seeds, steps and streams share none."""
    bits = bits_of(12345, 0, 500, 64, -1).view(-1)
    for some, width in ((bits, 32), *((half, 16) for half in noise.halves(bits.clone()))):
        ones = torch.stack([(some >> k) & 1 for k in range(width)]).double().mean(1)
        assert ((ones - 0.5).abs() < 5 * 0.5 / bits.numel() ** 0.5).all()
    high, low = (half.double() - 2.0**15 for half in noise.halves(bits.clone()))
    assert abs(float((high * low).mean())) < 5 * 2.0**32 / 12 / bits.numel() ** 0.5
    keys = torch.stack([noise.key(*of, torch.device("cpu")) for of in ((0, "a"), (0, "b"), (1, "a"))])
    words = [noise.draw(keys, torch.full((3,), float(t)), stream) for t in range(3) for stream in range(6)]
    assert len({tuple(pair) for some in words for pair in some.tolist()}) == 54


# the optimizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_stay_near_those_with_fp32_factors(optimizer, form):
    lr = 0.001 if optimizer == "LoRAPreLion" else 0.01
    start, runs = Toy(torch.float32), {}
    for kept in ("fp32", form):
        runs[kept] = copy.deepcopy(start)
        train(runs[kept], OPTIMIZERS[optimizer](runs[kept].named_parameters(), rank=4, lr=lr, state_dtype=kept))
    moved = distance(runs["fp32"], start)
    assert 0 < distance(runs[form], runs["fp32"]) < (0.35 if form == "8bit" else 0.1) * moved


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(sum((p - q).detach().square().sum() for p, q in pairs) ** 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_state_by_hand(form):
    optimizer = LoRAPre(Toy(torch.float32).named_parameters(), rank=4, rank_v=2, state_dtype=form)
    matrices, extra = [(12, 8), (8, 17), (8, 6)], 4 if form == "8bit" else 0
    factors = sum((p + q) * ((4 + extra + 2 + extra) * BITS[form]) + 4 * p for p, q in matrices)
    rest = sum(p.numel() for p in Toy().parameters()) - sum(p * q for p, q in matrices)
    report = optimizer.memory_report()
    assert report.state_bytes == factors + 8 * rest
    assert (
        report.adamw_state_bytes
        == LoRAPre(Toy(torch.float32).named_parameters(), **STABLE).memory_report().adamw_state_bytes
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_skipped_changes_not_a_bit(form):
    class OnDevice(LoRAPre):
        _decides_on_device = True

    for cls in (LoRAPre, OnDevice):
        model = Toy(torch.float32)
        optimizer = cls(model.named_parameters(), **STABLE, state_dtype=form)
        train(model, optimizer, range(3))
        before = copy.deepcopy(state_tensors(optimizer))
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        model.norm.weight.grad[0] = torch.nan
        with pytest.warns(UserWarning, match="not finite"):
            optimizer.step()
        assert all(torch.equal(t, before[key]) for key, t in state_tensors(optimizer).items())
        train(model, optimizer, range(4, 5))
        assert not all(torch.equal(t, before[key]) for key, t in state_tensors(optimizer).items())


@pytest.mark.parametrize("form", ["fp16", "int8", 8, None])
def test_forms_that_are_none(form):
    with pytest.raises(ConfigError, match=r"state_dtype=.*must be one of 'fp32', 'bf16', '8bit'"):
        LoRAPre(Toy().named_parameters(), **STABLE, state_dtype=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shapes", [[(1024, 1376)], [(80, 60)] * 60], ids=["large", "stacks"])
def test_workspace_bounds_what_a_step_allocates(shapes, form):
    named = [(f"layers.{i}.q_proj", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]
    for _, p in named:
        p.grad = torch.randn(p.shape)
    bound, peak = bound_and_peak(lambda: LoRAPre(named, rank=40, state_dtype=form))
    assert peak <= bound, f"{peak / 2**20:.2f} MiB, bound {bound / 2**20:.2f} MiB"


# saving ---------------------------------------------------------------------------------------------------------------


def ways(tmp_path):
    """Ways to bring state from one optimizer (with its model) to another."""

    def files(model, optimizer, other, to):
        checkpoint.save(model, optimizer, tmp_path, "tag")
        checkpoint.load(other, to, tmp_path)

    return {
        "state_dict": lambda _, optimizer, __, to: to.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        "full": lambda _, optimizer, __, to: to.load_full_state_dict(optimizer.full_state_dict()),
        "checkpoint": files,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["state_dict", "full", "checkpoint"])
def test_a_resumed_run_has_the_same_bits(tmp_path, way, form):
    model = Toy(torch.float32)
    optimizer = LoRAPre(model.named_parameters(), **STABLE, state_dtype=form)
    train(model, optimizer, range(6))
    other = copy.deepcopy(model)
    resumed = LoRAPre(other.named_parameters(), **STABLE, state_dtype=form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ways(tmp_path)[way](model, optimizer, other, resumed)
    train(model, optimizer, range(6, 10))
    train(other, resumed, range(6, 10))
    assert_same(model, other)


@pytest.mark.parametrize("was, now", [("fp32", "8bit"), ("fp32", "bf16"), ("8bit", "fp32"), ("bf16", "8bit")])
@pytest.mark.parametrize("way", ["state_dict", "full", "checkpoint"])
def test_state_of_another_form_is_converted(tmp_path, way, was, now):
    """Each number to the nearest: within half a spacing, of 2^-7 of itself or 1/127 of the largest beside it."""
    model = Toy(torch.float32)
    optimizer = LoRAPre(model.named_parameters(), **STABLE, state_dtype=was)
    train(model, optimizer, range(6))
    resumed = LoRAPre(model.named_parameters(), **STABLE, state_dtype=now)
    if way == "full":
        ways(tmp_path)[way](model, optimizer, model, resumed)
    else:
        with pytest.warns(UserWarning, match=f"3 matrices were saved in another form.*state_dtype={now}"):
            ways(tmp_path)[way](model, optimizer, model, resumed)
    assert resumed.param_groups[0]["state_dtype"] == now
    before, after = optimizer.factors(), resumed.factors()
    for name, tensors in before.items():
        for key, tensor in tensors.items():
            dim = -1 if key.endswith("_B") else -2
            if key.endswith(("_A", "_B")):
                a, b = (quantized.widened(t, dim, torch.float32) for t in (tensor, after[name][key]))
                spacing = {"fp32": 0 * a, "bf16": a.abs() * 2.0**-7, "8bit": a.abs().amax(dim, keepdim=True) / 127}
                assert ((a - b).abs() <= 0.5001 * spacing[now] + 1e-12).all(), (name, key)
            else:
                assert torch.equal(tensor, after[name][key])
    train(model, resumed, range(6, 8))


def test_a_rank_is_changed_whatever_the_form(tmp_path):
    model = Toy(torch.float32)
    optimizer = LoRAPre(model.named_parameters(), **STABLE, state_dtype="8bit")
    train(model, optimizer, range(6))
    checkpoint.save(model, optimizer, tmp_path, "tag")
    for form in ("8bit", "fp32"):
        resumed = LoRAPre(model.named_parameters(), **{**STABLE, "rank": 3}, state_dtype=form)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.load(model, resumed, tmp_path, resize_rank=True)
        assert resumed.bound()[3].state.step == 6
        train(model, resumed, range(6, 8))
