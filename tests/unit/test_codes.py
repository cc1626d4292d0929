"""AdamW's moments in 8 bits: what can be told apart, what is right on average, and the steps that they lead to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorapre_dist import LoRAPre
from lorapre_dist.core import codes, noise
from lorapre_dist.core.spec import SCALES
from lorapre_dist.optimizers import OPTIMIZERS

from .test_report import bound_and_peak
from .toy import STABLE, Toy, assert_same, loss_of, state_tensors, train, train_three_rows

TYPES = {"exp_avg_8bit": torch.int8, "exp_avg_sq_8bit": torch.uint8}
SCALE_OF = {key: scale for scale, key in SCALES.items()}
TABLES = {"embed.weight", "head.weight", "k_proj.weight", "up_proj.weight"}


def numbers(dtype, rows=4, columns=256):
    """Rows of numbers over six orders of magnitude, and their scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).abs_() * torch.logspace(-6, 0, columns)
    if dtype == torch.int8:
        x *= torch.randn(rows, columns, generator=generator).sign()
    return x, x.abs().amax(-1, keepdim=True)


def beside(x, scale, dtype):
    """Distance of the two numbers between which each lies that can be kept."""
    signed = dtype == torch.int8
    most, power = (127, 2) if signed else (255, 4)
    low = ((x.abs() / scale) ** (1 / power) * most).floor().clamp(max=most - 1)
    return ((low + 1) ** power - low**power) / most**power * scale


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_codes_are_right_on_average(dtype):
    """Each within its spacing, and the mean of n within 5 standard errors: but for a v below all that can be kept."""
    x, scale = numbers(dtype)
    n, generator = 2000, torch.Generator().manual_seed(1)
    spacing, total = beside(x, scale, dtype), torch.zeros_like(x, dtype=torch.float64)
    for _ in range(n):
        random = torch.randint(0, 1 << 16, x.shape, generator=generator)
        found = codes.decoded(codes.encoded(x, scale, dtype, random), scale)
        assert ((found - x).abs() <= spacing * (1 + 1e-5)).all()
        total += found
    kept = x.abs() > scale * 255.0**-4
    # A share of 2^-17 that 16 bits cannot tell beside.
    assert ((total / n - x).abs() <= 5 * spacing / 2 / n**0.5 + spacing * 2.0**-16)[kept].all()


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_what_can_be_kept_is_kept(dtype):
    every = torch.arange(-127, 128) if dtype == torch.int8 else torch.arange(256)
    scale = torch.tensor([[3.0], [1e-20], [1e20]])
    wide = codes.decoded(every.to(dtype).expand(3, -1), scale)
    for random in (None, torch.zeros(1, dtype=torch.int32), torch.full((1,), 65535)):
        exact = codes.encoded(wide, scale, dtype, random).int() - every
        # A number that arithmetic has moved by its last bit may be taken for one below, once in 65536.
        assert exact.abs().max() <= (random is not None)
    assert torch.equal(codes.encoded(wide, scale, dtype).int(), every.int().expand(3, -1))


def test_no_second_moment_becomes_zero():
    """By which an update would be divided: whatever the bits, down to the smallest number beside the largest."""
    v = torch.tensor([[1.0, 1e-6, 1e-12, 1e-30, 0.0]])
    for random in (0, 30000, 65535):
        found = codes.encoded(v, v.amax(-1, keepdim=True), torch.uint8, torch.full(v.shape, random))
        assert (found[0, :4] > 0).all() and found[0, 4] == 0
        assert codes.decoded(found, torch.ones(1, 1))[0, 3].sqrt() == pytest.approx(255.0**-2)
    assert not codes.encoded(torch.zeros(1, 3), torch.zeros(1, 1), torch.uint8).any()


# the optimizer --------------------------------------------------------------------------------------------------------


def dense(theta, g, state, key, lr=0.01, betas=(0.9, 0.999), eps=1e-8, decay=0.1):
    """``torch.optim.AdamW``, whose moments are put into codes after each step, on a whole matrix."""
    state["t"] += 1
    t, (p, q) = state["t"], theta.shape
    wide = {k: codes.decoded(code, scale) for k, (code, scale) in state["codes"].items()}
    m = betas[0] * wide["exp_avg_8bit"] + (1 - betas[0]) * g
    v = betas[1] * wide["exp_avg_sq_8bit"] + (1 - betas[1]) * g * g
    theta.mul_(1 - lr * decay)
    theta.sub_(lr / (1 - betas[0] ** t) * m / ((v / (1 - betas[1] ** t)).sqrt() + eps))
    words = noise.draw(key, torch.tensor(float(t)), noise.CODES)
    random = noise.halves(noise.bits(torch.arange(p * q, dtype=torch.int32), words))
    for (name, dtype), moment, bits in zip(TYPES.items(), (m, v), random, strict=True):
        scale = moment.abs().amax(1, keepdim=True)
        state["codes"][name] = codes.encoded(moment, scale, dtype, bits.view(p, q)), scale


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_those_of_adamw_whose_moments_are_in_codes(optimizer):
    """Whatever steps the projections; in fp64, where sums in another order round no number the other way."""
    model = Toy()
    own = {} if optimizer in ("LoRAPre", "LoRAPreAdafactor") else {"adamw_lr": 0.01, "adamw_weight_decay": 0.1}
    stepper = OPTIMIZERS[optimizer](model, lr=0.01, weight_decay=0.1, rank=4, other_state="adamw8bit", **own)
    theta = {name: p.detach().clone() for name, p in model.named_parameters() if name in TABLES}
    state = {}
    for name, p in theta.items():
        zeros = p.new_zeros(len(p), 1)
        state[name] = {"t": 0, "codes": {k: (torch.zeros(p.shape, dtype=d), zeros) for k, d in TYPES.items()}}
    for step in range(12):
        stepper.zero_grad()
        loss_of(model, step).backward()
        for name, p in theta.items():
            dense(p, model.get_parameter(name).grad, state[name], noise.key(0, name, p.device))
        stepper.step()
    held = state_tensors(stepper)
    for name, want in theta.items():
        assert torch.allclose(model.get_parameter(name), want, rtol=1e-9, atol=1e-12), name
        for key, (code, scale) in state[name]["codes"].items():
            assert torch.equal(held[name, key].view(code.shape), code), (name, key)
            assert torch.allclose(held[name, SCALE_OF[key]], scale[:, 0], rtol=1e-9), (name, key)
    assert not TABLES & stepper.factors().keys()
    assert held["norm.weight", "exp_avg"].dtype == torch.float64  # vectors keep AdamW's


@pytest.mark.parametrize("block", [1 << 20, 1 << 8], ids=["one block", "many blocks"])
def test_the_trained_model_is_near_that_of_adamw(block):
    """After 60 steps of 0.01: closer than 1% of the way that the weights have gone."""
    start, runs = Toy(torch.float32), {}
    for other_state in ("adamw", "adamw8bit"):
        model = runs[other_state] = copy.deepcopy(start)
        optimizer = LoRAPre(model, **STABLE, other_state=other_state)
        optimizer.workspace = type(optimizer.workspace)(block=block)
        train(model, optimizer, range(60))
    for name in TABLES:
        before, plain, coded = (m.get_parameter(name).detach() for m in (start, *runs.values()))
        assert float((coded - plain).norm() / (plain - before).norm()) < 0.05, name


def test_rows_that_never_have_a_gradient_do_not_move():
    model = Toy(torch.float32)
    optimizer = LoRAPre(model, **STABLE, other_state="adamw8bit")
    before = model.embed.weight.detach().clone()
    train_three_rows(model, optimizer)
    assert torch.equal(model.embed.weight[3:], before[3:])
    v = state_tensors(optimizer)["embed.weight", "exp_avg_sq_8bit"].view(before.shape)
    assert not v[3:].any() and v[:3].all()


def test_a_skipped_step_changes_no_bit(monkeypatch):
    monkeypatch.setattr(LoRAPre, "_decides_on_device", True)
    model = Toy(torch.float32)
    optimizer = LoRAPre(model, **STABLE, other_state="adamw8bit")
    train(model, optimizer, range(3))
    before, state = copy.deepcopy(model), {k: t.clone() for k, t in state_tensors(optimizer).items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert_same(model, before)
    for key, tensor in state_tensors(optimizer).items():
        assert torch.equal(tensor, state[key]), key


def test_stacks_give_the_codes_of_single_matrices():
    """Small tables alike go through a step together, and keep what each would by itself."""
    found = {}
    for fewest in (2, 99):
        named = [(f"tables.{k}.embed", nn.Parameter(torch.ones(9, 8) * (k + 1))) for k in range(12)]
        matrix = ("layers.0.q_proj", nn.Parameter(torch.ones(8, 8)))
        optimizer = LoRAPre([*named, matrix], rank=2, lr=0.01, other_state="adamw8bit")
        optimizer.workspace = type(optimizer.workspace)(fewest=fewest)
        for step in range(4):
            for k, (_, p) in enumerate([*named, matrix]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(20 * step + k))
            optimizer.step()
        found[fewest] = {key: t.clone() for key, t in state_tensors(optimizer).items() if "embed" in key[0]}
    for key, tensor in found[2].items():
        assert torch.equal(tensor, found[99][key]), key


def test_bytes_of_state_by_hand():
    def held(**options):
        return LoRAPre(Toy(torch.float32), rank=4, **options).memory_report().state_bytes

    shapes = [Toy().get_parameter(name).shape for name in TABLES]
    assert held() - held(other_state="adamw8bit") == sum(6 * p * q - 8 * p for p, q in shapes)


@pytest.mark.parametrize("shape", [(8192, 512), (64, 40000)], ids=["table", "wide rows"])
def test_workspace_bounds_what_a_step_allocates(shape):
    named = [("layers.0.q_proj", nn.Parameter(torch.ones(64, 64))), ("embed", nn.Parameter(torch.ones(shape)))]
    for _, p in named:
        p.grad = torch.ones_like(p)
    bound, peak = bound_and_peak(lambda: LoRAPre(named, rank=4, other_state="adamw8bit"))
    assert peak <= bound
