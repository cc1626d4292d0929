"""bf16 weights without an fp32 copy: what rounding loses on average, what is kept, and the same bits everywhere."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorapre_dist import ConfigError, LoRAPre, checkpoint
from lorapre_dist.checkpoint.consolidate import consolidate
from lorapre_dist.core import rounding
from lorapre_dist.core.interval import RowInterval
from lorapre_dist.optimizers import OPTIMIZERS
from tests.distributed.native_cases import OPTIONS

from .test_report import bound_and_peak
from .toy import Toy, assert_same, state_tensors

ONE = 1.0
ULP = 2.0**-7  # of a bf16 number in [1, 2)
STEPS = 40


class Holder:
    """What :func:`rounding.draw` looks at."""

    def __init__(self, name="w", seed=0, start=0, width=1, stride=1, taken=0):
        self.rounding = rounding.stochastic(name, seed, start, width, stride, torch.device("cpu"))
        self.taken = torch.tensor(float(taken), dtype=torch.float64)


def bits(count, at=0, **holder):
    held = Holder(**holder)
    rounding.draw([held])
    return held.rounding.random(at, count)


def rounded(value, count, **holder):
    """``count`` weights of ``value``, rounded."""
    held, theta = Holder(**holder), torch.zeros(count, dtype=torch.bfloat16)
    rounding.draw([held])
    held.rounding.put(torch.full((count,), value), theta, 0)
    return theta.float()


# stochastic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [2.0**-12, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_is_unbiased(fraction, sign):
    """Over 2^20 elements and over 64 steps of 2^14: the share that goes up lies within 5 sigma of a fair draw's.

    ``sigma = sqrt(f (1 - f) / n)``; for one of these 16 to fail by chance has a probability of 1e-5.
    """
    value = sign * (ONE + fraction * ULP)
    over_elements = rounded(value, 1 << 20)
    over_steps = torch.cat([rounded(value, 1 << 14, taken=step) for step in range(64)])
    for found in (over_elements, over_steps):
        up = found.abs() == ONE + ULP
        assert bool((up | (found.abs() == ONE)).all()) and bool((found.sign() == sign).all())
        sigma = math.sqrt(fraction * (1 - fraction) / len(found))
        assert abs(float(up.double().mean()) - fraction) <= 5 * sigma


def test_random_bits_are_uniform_and_independent():
    """Chi-square of the 65,536 values within 5 sigma; neighbours, steps, names and seeds are uncorrelated."""
    n = 1 << 22
    drawn = bits(n)
    counts = torch.bincount(drawn, minlength=1 << 16).double()
    expected = n / (1 << 16)
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi - (1 << 16)) <= 5 * math.sqrt(2 * (1 << 16))
    base = drawn[: 1 << 20]
    others = {
        "neighbour": bits(1 << 20, at=1),
        "row of 1024 below": bits(1 << 20, at=1024),
        "step": bits(1 << 20, taken=1),
        "far step": bits(1 << 20, taken=1 << 16),
        "name": bits(1 << 20, name="v"),
        "seed": bits(1 << 20, seed=1),
        "beyond 2^31": bits(1 << 20, start=(1 << 31) - (1 << 19)),
    }
    x = base.double() - base.double().mean()
    for what, other in others.items():
        y = other.double() - other.double().mean()
        correlation = float((x * y).mean() / (x.std() * y.std()))
        assert abs(correlation) <= 5 / math.sqrt(len(x)), what
        for bit in (0, 8, 15):
            same = float((((base ^ other) >> bit) & 1).double().mean())
            assert abs(same - 0.5) <= 5 * 0.5 / math.sqrt(len(x)), (what, bit)


@pytest.mark.parametrize("start, stop", [(0, 91), (0, 5), (13, 26), (3, 17), (40, 91), (90, 91), (7, 7)])
def test_a_shard_draws_what_the_whole_matrix_draws(start, stop):
    whole = bits(7 * 13, name="layers.0.q_proj.weight", taken=5)
    assert torch.equal(bits(stop - start, name="layers.0.q_proj.weight", taken=5, start=start), whole[start:stop])
    for at in range(0, stop - start, 4):  # block by block
        part = bits(min(4, stop - start - at), at=at, name="layers.0.q_proj.weight", taken=5, start=start)
        assert torch.equal(part, whole[start + at : min(start + at + 4, stop)])


@pytest.mark.parametrize("rows, columns", [((0, 7), (0, 5)), ((2, 5), (5, 13)), ((0, 7), (12, 13))])
def test_a_block_of_columns_draws_what_the_whole_matrix_draws(rows, columns):
    whole = bits(7 * 13, taken=3).view(7, 13)[slice(*rows), slice(*columns)]
    width = columns[1] - columns[0]
    got = bits(whole.numel(), start=rows[0] * 13 + columns[0], width=width, stride=13, taken=3)
    assert torch.equal(got.view(whole.shape), whole)
    interval = RowInterval("w", (7, 13), rows[0] * 13, rows[1] * 13, columns)
    assert interval.numel == whole.numel()


def test_places_beyond_32_bits_are_those_of_a_run():
    far = (1 << 33) + 12345
    assert torch.equal(bits(100, start=far, at=7), bits(100, start=far + 7))


# kahan --------------------------------------------------------------------------------------------------------------


def test_both_halves_are_the_number():
    """Of every sign and exponent; the upper half is the nearest bf16 number."""
    pattern = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    numbers = pattern.to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2.0**-8, 2 - 2.0**-23, 3e38, 1e-38, 1 + 3 * 2.0**-8])
    numbers = torch.cat([edges, numbers[numbers.isfinite() & (numbers.abs() > 1e-37) & (numbers.abs() < 3e38)]])
    theta, low = torch.empty_like(numbers, dtype=torch.bfloat16), torch.empty_like(numbers, dtype=torch.int16)
    rounding.split(numbers.clone(), theta, low)
    assert torch.equal(rounding.joined(theta, low).view(torch.int32), numbers.view(torch.int32))
    nearest = (numbers.to(torch.bfloat16).float() - numbers).abs()
    assert bool(((theta.float() - numbers).abs() <= nearest).all())


def test_a_weight_that_somebody_set_to_zero_is_zero():
    theta, low = torch.zeros(4, dtype=torch.bfloat16), torch.tensor([-5, 5, -32768, 32767], dtype=torch.int16)
    assert torch.equal(rounding.joined(theta, low), torch.zeros(4))


# steps --------------------------------------------------------------------------------------------------------------


def alike(weights, dtype=torch.bfloat16, optimizer="LoRAPre", **options):
    """A model whose first weights are bf16 numbers, of ``dtype``, and its optimizer."""
    model = Toy(torch.float32)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).to(dtype)
    settings = {**OPTIONS[optimizer], "rank": 4, "weights": weights, **options}
    return model, OPTIMIZERS[optimizer](model.named_parameters(), **settings)


def train(model, optimizer, steps, scale=1.0):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(torch.bfloat16).to(p.dtype)
        optimizer.step()


def values(model, optimizer):
    """The fp32 numbers that the weights stand for."""
    state = optimizer.full_state_dict()
    found = {}
    for name, p in model.named_parameters():
        low = state[name].get("compensation")
        found[name] = p.detach().float()
        if low is not None:
            found[name] = rounding.joined(p.detach(), low.view(torch.int16).view(p.shape))
    return found


def assert_values(got, want):
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("block", [1 << 20, 1 << 8], ids=["one block", "many blocks"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_kahan_takes_the_very_steps_of_fp32_weights(optimizer, block):
    """Of all five, block by block: bf16 weights and what they lack are the fp32 master's, bit for bit."""
    runs = []
    for weights, dtype in (("kahan", torch.bfloat16), ("master", torch.float32)):
        model, stepper = alike(weights, dtype, optimizer)
        stepper.workspace = replace(stepper.workspace, block=block)
        train(model, stepper, range(12))
        runs.append(values(model, stepper))
    assert_values(*runs)


def stack(weights, dtype, stacked):
    named = [(f"layers.{k}.q_proj", nn.Parameter(torch.ones(9, 8, dtype=dtype) * (k + 1))) for k in range(12)]
    optimizer = LoRAPre(named, rank=2, lr=0.01, weights=weights)
    optimizer.workspace = replace(optimizer.workspace, fewest=2 if stacked else 99)
    for step in range(4):
        for k, (_, p) in enumerate(named):
            p.grad = torch.randn(9, 8, generator=torch.Generator().manual_seed(12 * step + k)).to(dtype)
        optimizer.step()
    return torch.stack([p.detach().float() for _, p in named]), optimizer


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
def test_stacks_give_the_bits_of_single_matrices(weights):
    """What rounding did is that of each matrix by itself; products of a stack differ in the last places of fp32."""
    together, optimizer = stack(weights, torch.bfloat16, True)
    apart, _ = stack(weights, torch.bfloat16, False)
    assert float((together != apart).double().mean()) < 1e-2
    if weights == "stochastic":
        keys = torch.stack([b.state.rounding.keys for b in optimizer.bound()])
        assert len(keys.unique(dim=0)) == 12


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
def test_a_skipped_step_changes_no_bit(optimizer, weights, monkeypatch):
    """Where the device decides, all arithmetic is done, by factors that change nothing."""
    monkeypatch.setattr(OPTIMIZERS[optimizer], "_decides_on_device", True)
    model, stepper = alike(weights, optimizer=optimizer)
    train(model, stepper, range(3))
    before, state = copy.deepcopy(model), {k: t.clone() for k, t in state_tensors(stepper).items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        stepper.step()
    assert_same(model, before)
    for key, tensor in state_tensors(stepper).items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("optimizer", ["LoRAPre", "LoRAPreLion"])
def test_tiny_updates_are_kept(optimizer):
    """Updates of a 200th of what bf16 can hold: plain rounding loses all, kahan nothing, stochastic none on average."""
    lr = ULP / 200
    moved = {}
    for weights in ("master", "stochastic", "kahan"):
        matrix, bias = nn.Parameter(torch.full((64, 48), 1.25)), nn.Parameter(torch.full((512,), 1.25))
        named = [("layers.0.q_proj", matrix), ("bias", bias)]
        for _, p in named:
            p.data = p.data.to(torch.bfloat16)
        options = {"scale": 1.0} if optimizer == "LoRAPre" else {"adamw_lr": lr}
        stepper = OPTIMIZERS[optimizer](named, rank=4, lr=lr, weights=weights, **options)
        for _ in range(STEPS):
            for _, p in named:
                p.grad = torch.full_like(p, 0.5)
            stepper.step()
        low = stepper.full_state_dict()["bias"].get("compensation")
        bias_now = bias.detach() if low is None else rounding.joined(bias.detach(), low.view(torch.int16).view(-1))
        moved[weights] = 1.25 - float(bias_now.float().mean()), 1.25 - float(matrix.detach().float().mean())
    assert moved["master"] == (0.0, 0.0)
    assert moved["kahan"][0] == pytest.approx(STEPS * lr, rel=0.01)
    # 40 steps of variance f (1 - f) ULP^2, over 512 elements: the mean's deviation is 0.02 ULP; the bound is five.
    assert moved["stochastic"][0] == pytest.approx(STEPS * lr, abs=0.1 * ULP)
    assert moved["stochastic"][1] > 0.05 * ULP


def test_resuming_goes_on_with_the_same_bits(tmp_path):
    for weights in ("stochastic", "kahan"):
        model, optimizer = alike(weights)
        train(model, optimizer, range(4))
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / weights)
        train(model, optimizer, range(4, 8))
        other, resumed = alike(weights)
        saved = torch.load(tmp_path / weights, weights_only=True)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        twin, copied = copy.deepcopy((other, resumed))
        for again, stepper in ((other, resumed), (twin, copied)):
            train(again, stepper, range(4, 8))
            assert_same(again, model)
            assert_values(values(again, stepper), values(model, optimizer))


# settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_types_are_refused(weights, dtype):
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"weights='{weights}': parameter embed.weight is {kind}; .*torch.bfloat16"):
        LoRAPre(Toy(dtype).named_parameters(), rank=4, weights=weights)


def test_a_model_that_is_converted_too_late_is_refused_when_it_steps():
    model = Toy(torch.bfloat16)
    optimizer = LoRAPre(model.named_parameters(), rank=4, weights="kahan")
    model.float()
    with pytest.raises(ConfigError, match="is float32"):
        optimizer.bound()


def test_an_unknown_value_is_refused():
    with pytest.raises(ConfigError, match="weights='stochstic': must be one of None, 'master', 'stochastic', 'kahan'"):
        LoRAPre(Toy(torch.bfloat16).named_parameters(), rank=4, weights="stochstic")


def test_a_group_has_its_own():
    model = Toy(torch.bfloat16)
    model.norm.float()
    norms = [(n, p) for n, p in model.named_parameters() if n.startswith("norm")]
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("norm")]
    optimizer = LoRAPre([{"params": rest}, {"params": norms, "weights": "master"}], rank=4, weights="kahan")
    train(model, optimizer, range(2))
    kept = {b.piece.name: "compensation" in b.state.tensors() for b in optimizer.bound()}
    assert kept == {n: not n.startswith("norm") for n in kept}
    assert optimizer.memory_report().weights == "bfloat16, kahan, float32"


def test_memory_report_counts_the_lower_halves():
    reports = {w: alike(w)[1].memory_report() for w in ("stochastic", "kahan")}
    elements = sum(p.numel() for p in Toy().parameters())
    assert reports["kahan"].state_bytes - reports["stochastic"].state_bytes == 2 * elements
    for weights, report in reports.items():
        assert report.weight_bytes == 2 * elements
        assert report.weights == f"bfloat16, {weights}"
        assert f"(bfloat16, {weights})" in str(report)


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
@pytest.mark.parametrize("optimizer", ["LoRAPre", "LoRAPreMuon"])
@pytest.mark.parametrize(
    "shapes", [[(1024, 1376)], [(80, 60)] * 100, [(64, 64), (8192, 512)]], ids=["large", "stacks", "embed"]
)
def test_workspace_bounds_what_a_step_allocates(weights, optimizer, shapes):
    names = ["q_proj", "embed"] if len(shapes) == 2 else [f"{i}.experts.q_proj" for i in range(len(shapes))]
    named = [(n, nn.Parameter(torch.zeros(s, dtype=torch.bfloat16))) for n, s in zip(names, shapes, strict=True)]
    for _, p in named:
        p.grad = torch.randn(p.shape).to(torch.bfloat16)
    bound, peak = bound_and_peak(lambda: OPTIMIZERS[optimizer](named, rank=16, weights=weights))
    assert peak <= bound, f"{peak / 2**20:.2f} MiB, bound {bound / 2**20:.2f} MiB"


# checkpoints --------------------------------------------------------------------------------------------------------

KINDS = {"master": torch.float32, "stochastic": torch.bfloat16, "kahan": torch.bfloat16}


@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_a_checkpoint_is_loaded_however_weights_are_kept(before, after, tmp_path):
    """Between fp32 weights and bf16 ones with compensation without a bit lost; what is not as it was is said."""
    model, optimizer = alike(before, KINDS[before])
    train(model, optimizer, range(4))
    checkpoint.save(model, optimizer, tmp_path, "four")
    other, resumed = alike(after, KINDS[after])
    train(other, resumed, range(90, 92))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checkpoint.load(other, resumed, tmp_path, "four")
    assert resumed.param_groups[0]["weights"] == after
    words = [str(w.message) for w in said]
    assert len(words) == (("kahan" in (before, after)) and before != after)
    lossless = after != "stochastic" or before == "stochastic"
    want = values(model, optimizer)
    if not lossless:  # to the nearest
        want = {n: v.to(torch.bfloat16).float() for n, v in want.items()}
    got = values(other, resumed)
    assert all(torch.allclose(got[n], want[n], rtol=0 if lossless else 2.0**-8, atol=0) for n in want)
    if lossless and {before, after} <= {"master", "kahan"}:
        train(model, optimizer, range(4, 8))
        train(other, resumed, range(4, 8))
        assert_values(values(other, resumed), values(model, optimizer))


def test_weights_alone_bring_what_they_lack(tmp_path):
    """Without the state, too: the compensation is the weights'."""
    model, optimizer = alike("kahan")
    train(model, optimizer, range(4))
    checkpoint.save(model, optimizer, tmp_path, "four")
    for after in ("kahan", "master"):
        other, resumed = alike(after, KINDS[after])
        train(other, resumed, range(90, 92))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.load(other, resumed, tmp_path, "four", states=False)
        assert_values(values(other, resumed), values(model, optimizer))
        assert {b.state.step for b in resumed.bound()} == {2}


def test_state_dicts_without_compensation_are_loaded_with_a_word():
    model, optimizer = alike("stochastic")
    train(model, optimizer, range(2))
    other, resumed = alike("kahan")
    train(other, resumed, range(3))
    with pytest.warns(UserWarning, match="13 parameters begin without compensation: it was not saved"):
        resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="the compensation of 13 parameters is not kept here"):
        optimizer.load_state_dict(resumed.state_dict())
    train(other, resumed, range(3, 4))
    with pytest.warns(UserWarning, match="13 parameters begin without compensation"):
        resumed.load_full_state_dict(optimizer.full_state_dict())
    assert all(not b.state.rounding.low.any() for b in resumed.bound())
    with pytest.warns(UserWarning, match="the compensation of 13 parameters is not kept here"):
        optimizer.load_full_state_dict(resumed.full_state_dict())


def test_consolidated_weights_are_the_bf16_ones(tmp_path):
    model, optimizer = alike("kahan")
    train(model, optimizer, range(2))
    checkpoint.save(model, optimizer, tmp_path, "two")
    consolidate(tmp_path / "two", tmp_path / "out")
    weights, state = {}, {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        (state if file.name.startswith("optimizer") else weights).update(load_file(file))
    for name, p in model.named_parameters():
        assert torch.equal(weights[name], p) and weights[name].dtype == torch.bfloat16
        low = state[f"{name}.compensation"].view(torch.int16).view(p.shape)
        assert torch.equal(rounding.joined(weights[name], low), values(model, optimizer)[name])
    described = json.loads((tmp_path / "out" / "optimizer.json").read_text())
    assert {entry["weights"] for entry in described["parameters"].values()} == {"kahan"}
