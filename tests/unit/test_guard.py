"""Gradients that are not finite, and of any size: what a step makes of them, in all five optimizers."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

from lorapre_dist import NonFiniteError
from lorapre_dist.core.guard import sample
from lorapre_dist.core.sizes import SAMPLES
from lorapre_dist.optimizers import OPTIMIZERS
from tests.covering import covering

from .toy import Toy, loss_of, state_tensors

BAD = [float("nan"), float("inf"), float("-inf")]
STABLE = {name: {"rank": 4, "lr": 0.01, "weight_decay": 0.1} for name in OPTIMIZERS}
PAPER = {name: {**options, "variant": "paper", "damping": 1e-2} for name, options in STABLE.items()}


def build(name, model, device_decides=False, **more):
    optimizer = OPTIMIZERS[name](model.named_parameters(), **{**STABLE[name], **more})
    optimizer._decides_on_device = device_decides
    return optimizer


def backward(model, step):
    model.zero_grad()
    loss_of(model, step).backward()


def everything(model, optimizer):
    tensors = {("weight", n): p.detach().clone() for n, p in model.named_parameters()}
    tensors |= {key: t.clone() for key, t in state_tensors(optimizer).items()}
    steps = {(b.piece.name, "step"): b.state.step for b in optimizer.bound()}
    return tensors, steps


# a step that is skipped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, at, device_decides, value, where",
    covering(OPTIMIZERS, [0, 3], [False, True], BAD, ["q_proj.weight", "embed.weight", "norm.bias"], strength=3),
)
def test_a_gradient_that_is_not_finite_changes_nothing(name, at, device_decides, value, where):
    """Not a bit of weights and state, no counter; and the run goes on as if the step had not been."""
    (model, optimizer), (other, untouched) = (
        (model, build(name, model, device_decides)) for model in (Toy(torch.float32), Toy(torch.float32))
    )
    for step in range(at):
        for m, o in ((model, optimizer), (other, untouched)):
            backward(m, step)
            o.step()
    before = everything(model, optimizer)
    backward(model, 50)
    dict(model.named_parameters())[where].grad.view(-1)[1] = value
    with pytest.warns(UserWarning, match=r"not finite: step skipped \(1 in a row, 1 all together\)"):
        optimizer.step()
    after = everything(model, optimizer)
    assert before[1] == after[1]
    assert all(torch.equal(tensor, after[0][key]) for key, tensor in before[0].items())
    assert (optimizer.skipped_steps, optimizer.overflow) == (1, True)
    for step in range(at, at + 3):
        for m, o in ((model, optimizer), (other, untouched)):
            backward(m, step)
            o.step()
    (mine, steps), (theirs, wanted) = everything(model, optimizer), everything(other, untouched)
    assert steps == wanted and all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    assert (optimizer.skipped_steps, optimizer.overflow) == (1, False)


@pytest.mark.parametrize("options", [STABLE, PAPER], ids=["stable", "paper"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_device_decides_as_the_host_does(name, options):
    model, other = Toy(), Toy()
    host, device = build(name, model, **options[name]), build(name, other, device_decides=True, **options[name])
    for step in range(6):
        for m, o in ((model, host), (other, device)):
            backward(m, step)
            if step == 3:
                m.q_proj.weight.grad[2, 2] = float("nan")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                o.step()
    (mine, steps), (theirs, wanted) = everything(model, host), everything(other, device)
    assert steps == wanted and host.skipped_steps == device.skipped_steps == 1
    for key, tensor in mine.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("device_decides", [False, True])
def test_too_many_in_a_row_are_an_error_that_names_the_parameters(device_decides):
    model = Toy(torch.float32)
    optimizer = build("LoRAPre", model, device_decides, max_skipped=3)
    for good in (False, False, True, False, False, False):
        backward(model, 0)
        if not good:
            model.down_proj.weight.grad[0, 0] = float("nan")
            model.norm.weight.grad[0] = float("inf")
        if optimizer.skips.seen == (4, 2):
            with pytest.raises(NonFiniteError, match=r"in 3 steps in a row.*: norm.weight, down_proj.weight"):
                optimizer.step()
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    assert optimizer.skipped_steps == 5
    assert all(t.isfinite().all() for t in everything(model, optimizer)[0].values())


def test_a_saved_state_goes_on_with_the_count(tmp_path):
    from lorapre_dist import checkpoint

    model = Toy(torch.float32)
    optimizer = build("LoRAPre", model)
    for bad in (False, True):
        backward(model, 0)
        if bad:
            model.embed.weight.grad[0, 0] = float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    checkpoint.save(model, optimizer, tmp_path, "one")
    resumed = build("LoRAPre", other := Toy(torch.float32))
    checkpoint.load(other, resumed, tmp_path, "one")
    assert resumed.skipped_steps == 1 and resumed.skips.seen == (1, 0)


# gradients of any size -------------------------------------------------------------------------------------------


def gradients(steps, shape=(24, 40), seed=0):
    generator = torch.Generator().manual_seed(seed)
    signal = 0.3 * torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    return [signal + torch.randn(shape, generator=generator) for _ in range(steps)]


def alone(name, stack=0):
    """An optimizer on one matrix, or on a stack of them, without what has a size of its own."""
    options = {"LoRAPre": {"eps": 0.0}, "LoRAPreAdafactor": {"eps": 0.0}, "LoRAPreMuon": {"eps": 1e-37}}
    parameter = nn.Parameter(torch.zeros(*[stack] * (stack > 0), 24, 40))
    return parameter, OPTIMIZERS[name]([("up_proj", parameter)], rank=4, lr=0.01, **options.get(name, {}))


@functools.cache
def wanted_of(name, stack):
    return stepped(name, 1.0, stack=stack)[0]


def stepped(name, scale, device_decides=False, stack=0):
    parameter, optimizer = alone(name, stack)
    optimizer._decides_on_device = device_decides
    for g in gradients(20):
        parameter.grad = (g * scale).expand_as(parameter).clone()
        optimizer.step()
    return parameter.detach().double(), optimizer


@pytest.mark.parametrize(
    "name, scale, stack, device_decides",
    covering(OPTIMIZERS, [1e-30, 1e-20, 1e-12, 1e12, 1e18, 1e19, 1e25, 1e30], [0, 3], [False, True]),
)
def test_the_update_does_not_see_the_gradients_scale(name, scale, stack, device_decides):
    wanted = wanted_of(name, stack)
    found, optimizer = stepped(name, scale, device_decides, stack)
    assert optimizer.skipped_steps == 0
    for factors in optimizer.factors().values():
        assert all(tensor.isfinite().all() for tensor in factors.values())
    if name == "LoRAPreSGD":  # whose update is proportional to it
        found = found / scale
    # Rounding, which Muon's iterations enlarge, and where there is an eps that of a gradient of size 1.
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_whose_size_changes_by_many_orders_keeps_everything_finite(name):
    parameter, optimizer = alone(name)
    for k, g in enumerate(gradients(60)):
        parameter.grad = g * 10.0 ** (30 - k) if k % 20 else g * 10.0 ** (k - 30)
        optimizer.step()
        assert parameter.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in optimizer.factors()["up_proj"].values())


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_element_of_1e30_may_cost_its_own_update_and_not_the_matrix(name, at):
    found = []
    for spike in (False, True):
        parameter, optimizer = alone(name)
        for step, g in enumerate(gradients(25, seed=3)):
            if spike and step == at:
                g[7, 11] = 1e30
            parameter.grad = g
            optimizer.step()
        assert all(tensor.isfinite().all() for tensor in optimizer.factors()["up_proj"].values())
        found.append(parameter.detach())
    others = torch.arange(24) != 7
    # Lion's sign turns on what is next to 0.
    limit = 0.05 if name == "LoRAPreLion" else 0.02
    assert (found[1] - found[0])[others].norm() <= limit * found[0][others].norm()
    assert (found[1] - found[0])[7].norm() <= 0.3 * found[0][7].norm()


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("value", [1e30, 3e38])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_under_adamw_stay_finite(name, value, device_decides):
    model = Toy(torch.float32)
    optimizer = build(name, model, device_decides)
    for step in range(3):
        backward(model, step)
        model.norm.bias.grad[2] = value
        optimizer.step()
    assert all(t.isfinite().all() for t in everything(model, optimizer)[0].values())


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (7, 13), (64, 64), (4096, 11008), (100000, 5)])
def test_samples_lie_in_all_parts_of_a_matrix(shape):
    places = sample(shape)
    assert len(set(places)) == len(places) <= SAMPLES
    assert all(0 <= row < shape[0] and 0 <= column < shape[1] for row, column in places)
    for dim in (0, 1):
        assert len({place[dim] for place in places}) >= min(shape[dim], 60) * 0.9
