"""Gradients that are used in the backward pass, on one device: results, refusals, and what memory they take."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorapre_dist import LoRAPre, checkpoint
from lorapre_dist.config import ConfigError
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.optimizers.skipping import NonFiniteError

from .toy import STABLE, Toy, assert_same, loss_of, train


def released(model, cls=LoRAPre, bucket=1, **options):
    """An optimizer that steps each gradient by itself, or those of ``bucket`` bytes together."""
    optimizer = cls(model.named_parameters(), **{**STABLE, **options}, release_gradients=True)
    optimizer.workspace = replace(optimizer.workspace, bucket=bucket)
    return optimizer


@pytest.mark.parametrize("bucket", [1, 600, 1 << 30])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_with_gradients_that_are_kept(optimizer, bucket):
    """In fp64, up to the order of sums: other matrices go together."""
    model, cls = Toy(), OPTIMIZERS[optimizer]
    other = copy.deepcopy(model)
    options = {"rank": 4, "lr": 0.001 if optimizer == "LoRAPreLion" else 0.01}
    kept = cls(model.named_parameters(), **options)
    early = cls(other.named_parameters(), **options, release_gradients=True)
    early.workspace = replace(early.workspace, bucket=bucket)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (kept, early)]
    for step in range(12):
        for net, stepper, schedule in zip((model, other), (kept, early), schedules, strict=True):
            loss_of(net, step).backward()
            stepper.step()
            stepper.zero_grad()
            schedule.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)
    assert all(b.state.step == 12 for b in early.bound())


def test_a_matrix_is_stepped_before_the_backward_pass_is_over():
    model = Toy()
    optimizer = released(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def at_the_end(_):
        seen.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})

    model.embed.weight.register_hook(at_the_end)  # the last gradient
    loss_of(model, 0).backward()
    assert seen[0] == before.keys() - {"embed.weight"}
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(b.state.step == 1 for b in optimizer.bound())


def test_tied_parameters_are_stepped_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(2)])
            self.embed = nn.Embedding(11, 8, dtype=torch.float64)

        def forward(self, tokens):
            x = self.embed(tokens)
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x @ self.embed.weight.T

    torch.manual_seed(0)
    model, tokens = Tied(), torch.arange(11)[None]
    other = copy.deepcopy(model)
    options = {"rank": 2, "target_modules": ["layers"]}
    kept, early = LoRAPre(model, **options), LoRAPre(other, **options, release_gradients=True)
    early.workspace = replace(early.workspace, bucket=1)
    for _ in range(3):
        for net, stepper in ((model, kept), (other, early)):
            stepper.zero_grad()
            nn.functional.cross_entropy(net(tokens)[0], tokens[0]).backward()
            stepper.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10)


def test_accumulation_is_refused():
    model = Toy()
    optimizer = released(model)
    loss_of(model, 0).backward()
    with pytest.raises(ConfigError, match=r"gradient of head.* came twice before optimizer.step\(\)"):
        loss_of(model, 1).backward()
    assert optimizer.bound()


def test_clipping_by_each_parameters_own_norm():
    """As with gradients that are clipped by hand, one by one."""
    model = Toy()
    other = copy.deepcopy(model)
    kept, early = LoRAPre(model.named_parameters(), **STABLE), released(other, clip_each=0.02)
    clipped = 0
    for step in range(5):
        kept.zero_grad()
        loss_of(model, step).backward()
        for p in model.parameters():
            clipped += float(p.grad.norm()) > 0.02
            nn.utils.clip_grad_norm_([p], 0.02)
        kept.step()
        loss_of(other, step).backward()
        early.step()
    assert clipped > 5
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-7)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize(
    "options, text",
    [
        ({"clip_each": 1.0}, r"clip_each=1.0: is for gradients that are released.*gradient_clipping"),
        ({"clip_each": 0, "release_gradients": True}, r"clip_each=0: must be a number in \(0, inf\)"),
        ({"release_gradients": 1}, r"release_gradients=1: must be true or false"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ConfigError, match=text):
        LoRAPre(Toy().named_parameters(), **STABLE, **options)


def test_a_group_cannot_differ():
    named = list(Toy().named_parameters())
    with pytest.raises(ConfigError, match="release_gradients=True in a parameter group"):
        LoRAPre([{"params": named[:3]}, {"params": named[3:], "release_gradients": True}], **STABLE)


def test_what_is_not_finite_changes_nothing_of_its_own_and_counts_as_a_skipped_step():
    model = Toy()
    optimizer = released(model, max_skipped=2)
    train(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = model.q_proj.weight.register_hook(lambda g: g * torch.nan)
    loss_of(model, 2).backward()
    with pytest.warns(UserWarning, match="a gradient is not finite: step skipped \\(1 in a row"):
        optimizer.step()
    assert optimizer.skipped_steps == 1 and optimizer.overflow
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys() - {"q_proj.weight"}
    assert all(p.isfinite().all() for p in model.parameters())
    loss_of(model, 3).backward()
    with pytest.raises(NonFiniteError, match=r"on this rank: q_proj.weight"):
        optimizer.step()
    handle.remove()
    train(model, optimizer, range(4, 5))
    assert not optimizer.overflow


def test_a_killed_backward_pass_resumes_to_the_same_bits(tmp_path):
    """Checkpoints are taken between steps: what was stepped in the pass that was cut short is gone with the process."""
    model = Toy(torch.float32)
    optimizer = released(model, state_dtype="8bit")
    train(model, optimizer, range(3))
    checkpoint.save(model, optimizer, tmp_path, "tag")
    killed = copy.deepcopy(model)
    dying = released(killed, state_dtype="8bit")
    checkpoint.load(killed, dying, tmp_path)

    def die(_):
        raise KeyboardInterrupt

    killed.q_proj.weight.register_hook(die)
    with pytest.raises(KeyboardInterrupt):
        loss_of(killed, 3).backward()
    assert not torch.equal(killed.head.weight, model.head.weight)  # stepped already
    again = Toy(torch.float32, seed=9)
    resumed = released(again, state_dtype="8bit")
    checkpoint.load(again, resumed, tmp_path)
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert_same(model, again)


def test_copies_release_their_own_gradients_and_nobody_those_of_an_optimizer_that_is_gone():
    model = Toy()
    optimizer = released(model)
    train(model, optimizer, range(2))
    other, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(other, twin, range(2, 4))
    assert_same(model, other)
    del optimizer, twin
    gc.collect()
    before = model.q_proj.weight.detach().clone()
    loss_of(model, 4).backward()
    assert torch.equal(before, model.q_proj.weight) and model.q_proj.weight.grad is not None


def test_parameters_that_are_unfrozen_later_are_released_from_the_next_step_on():
    model = Toy()
    model.q_proj.weight.requires_grad_(False)
    optimizer = released(model)
    train(model, optimizer, range(2))
    model.q_proj.weight.requires_grad_(True)
    for step, early in ((2, False), (3, True)):
        loss_of(model, step).backward()
        assert (model.q_proj.weight.grad is None) == early
        optimizer.step()


def peak_of_backward(release):
    """The most bytes that a training step holds beyond what was there before it."""
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(12)])
    model = nn.ModuleDict({"layers": layers})
    optimizer = LoRAPre(model, rank=8, target_modules=["layers"], release_gradients=release)
    optimizer.workspace = replace(optimizer.workspace, bucket=1 << 18, block=1 << 16)

    def one_step():
        layers(torch.ones(2, 256)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one_step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one_step()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_a_few_gradients_exist_at_a_time():
    matrix = 256 * 256 * 4
    kept, early = peak_of_backward(False), peak_of_backward(True)
    assert kept >= 12 * matrix
    assert early <= 4 * matrix, (kept, early)
