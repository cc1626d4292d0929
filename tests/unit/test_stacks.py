"""Small matrices of equal shape are stepped as one, and nothing about them changes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorapre_dist.core import batching
from lorapre_dist.core import stacks as stacking
from lorapre_dist.core.batching import Limits
from lorapre_dist.core.exchange import Item
from lorapre_dist.core.guard import taken_for_granted
from lorapre_dist.optimizers import OPTIMIZERS

EXPERTS = 7


class Model(nn.Module):
    """Experts in one parameter, and as many matrices of the same shape that lie apart; a norm, and a large matrix."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).mul_(0.3).to(dtype))

        self.experts = nn.ParameterDict({"up_proj": weight(EXPERTS, 12, 10)})
        self.layers = nn.ModuleList(nn.ParameterDict({"up_proj": weight(12, 10)}) for _ in range(EXPERTS))
        self.down_proj = weight(40, 30)
        self.norm = weight(10)

    def gradients(self, step, dtype):
        """Gaussian; every third step there is none for one matrix, whose count of steps falls behind."""
        generator = torch.Generator().manual_seed(1000 + step)
        for name, p in self.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            if step % 3 == 2 and name == "layers.3.up_proj":
                p.grad = None


def optimizer_of(name, model, **options):
    lr = {"lr": 0.001} if name == "LoRAPreLion" else {"lr": 0.01}
    return OPTIMIZERS[name](model.named_parameters(), rank=4, weight_decay=0.1, **lr, **options)


def trained(name, block, dtype=torch.float64, steps=8, **options):
    model = Model(dtype)
    optimizer = optimizer_of(name, model, **options)
    optimizer.workspace = replace(optimizer.workspace, block=block)
    for step in range(steps):
        model.gradients(step, dtype)
        optimizer.step()
    return model, optimizer


def values(model, optimizer):
    state = {f"{n} {k}": t for n, tensors in optimizer.factors().items() for k, t in tensors.items()}
    return {n: p.detach() for n, p in model.named_parameters()} | state


# Bytes of a block: no stack; stacks of 8; all that are equal at once.
BLOCKS = (12 * 10 * 8, 8 * 12 * 10 * 8, 1 << 20)


@pytest.mark.parametrize("options", [{}, {"variant": "paper", "damping": 1e-3}], ids=["stable", "paper"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_with_and_without(name, options):
    alone, *others = (values(*trained(name, block, **options)) for block in BLOCKS)
    for other in others:
        assert other.keys() == alone.keys()
        for key, tensor in alone.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_weights(name):
    alone, whole = (values(*trained(name, block, torch.bfloat16, steps=2)) for block in (BLOCKS[0] // 2, BLOCKS[2]))
    for key, tensor in alone.items():
        torch.testing.assert_close(whole[key], tensor, rtol=2e-2, atol=1e-3)  # a bf16 rounding apart


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factors_of_next_to_nothing(name):
    """As hundreds of steps without gradient leave them, in one matrix of a stack."""
    found = []
    for block in (BLOCKS[0], BLOCKS[2]):
        model = Model()
        optimizer = optimizer_of(name, model)
        optimizer.workspace = replace(optimizer.workspace, block=block)
        model.gradients(0, torch.float64)
        optimizer.step()
        for moment in optimizer.factors()["experts.up_proj[2]"]:
            if moment.endswith("_A"):
                optimizer.factors()["experts.up_proj[2]"][moment].mul_(1e-20)
        for step in (1, 3):
            model.gradients(step, torch.float64)
            optimizer.step()
        found.append(values(model, optimizer))
    alone, whole = found
    for key, tensor in alone.items():
        assert tensor.isfinite().all(), key
        torch.testing.assert_close(whole[key], tensor, rtol=1e-8, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def stacks(matrices, block, others=()):
    """Those of more than one matrix."""
    waves = batching.plan([matrix.outline for matrix in matrices], Limits(1 << 30, block, 8), others)
    return [run for wave in waves for bucket in wave for run in bucket if len(run) > 1]


def test_only_what_is_alike_is_stacked():
    _, optimizer = trained("LoRAPre", BLOCKS[2], steps=3)
    matrices = [bound.state for bound in optimizer.bound() if hasattr(bound.state, "interval")]
    assert len(matrices) == 2 * EXPERTS + 1
    steps = [matrix.step for matrix in matrices]
    assert sorted(set(steps)) == [2, 3]

    def item(matrix, dtype=torch.float32):
        empty = torch.empty(matrix.interval.numel, dtype=dtype)
        return Item(matrix, empty, empty, torch.ones(()), taken_for_granted(empty.device))

    items = [item(matrix, torch.bfloat16 if k == 3 else torch.float32) for k, matrix in enumerate(matrices)]
    (run,) = stacks(matrices, 1 << 20, [stacking.kind(item) for item in items])
    # However many steps each has behind it; not the matrix of another shape, nor the one of another type.
    assert len(run) == 2 * EXPERTS - 1 and {matrices[k].step for k in run} == {2, 3} and 3 not in run
    sizes = [len(run) for run in stacks(matrices, 8 * 12 * 10 * 8)]
    assert sizes == [8, 6]
    assert stacks(matrices, 7 * 12 * 10 * 8) == []


def test_pieces_that_lie_behind_each_other_are_joined_by_a_view():
    pieces = list(torch.arange(24.0).view(4, 2, 3).unbind())
    joined = stacking._joined(pieces)
    assert joined.shape == (4, 2, 3) and joined.data_ptr() == pieces[0].data_ptr()
    assert torch.equal(joined, torch.stack(pieces))
    for apart in ([pieces[0], pieces[2]], [pieces[1], pieces[0]], [t.T for t in pieces]):
        joined = stacking._joined(apart)
        assert joined.data_ptr() != apart[0].data_ptr() and torch.equal(joined, torch.stack(apart))


def test_the_state_moves_together_once():
    model, optimizer = trained("LoRAPre", BLOCKS[2], steps=1)
    pointers = {key: t.data_ptr() for key, t in values(model, optimizer).items()}
    for step in (1, 3, 4):
        model.gradients(step, torch.float64)
        optimizer.step()
    assert {key: t.data_ptr() for key, t in values(model, optimizer).items()} == pointers


class Count(TorchDispatchMode):
    """Operations that PyTorch runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_takes_the_operations_of_one_matrix(name):
    def operations(experts, block=BLOCKS[2]):
        parameter = nn.Parameter(torch.zeros(experts, 12, 10))
        optimizer = optimizer_of(name, nn.ModuleDict({"experts": nn.ParameterDict({"up_proj": parameter})}))
        optimizer.workspace = replace(optimizer.workspace, block=block)
        parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
        with Count() as count:
            optimizer.step()
        assert len(optimizer.factors()) == experts
        return sum(n for op, n in count.calls.items() if any(word in op for word in ("mm", "cholesky", "lerp")))

    assert 0 < operations(32) == operations(2) < operations(2, block=12 * 10 * 4)


def test_a_copy_before_the_first_step_and_a_resume_in_the_middle():
    model, optimizer = trained("LoRAPre", BLOCKS[2], steps=4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = Model()
    resumed = optimizer_of("LoRAPre", other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for step in range(4, 8):
        for m, o in ((model, optimizer), (other, resumed)):
            m.gradients(step, torch.float64)
            o.step()
    want, got = values(model, optimizer), values(other, resumed)
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_of_one_stack_are_there_at_a_time(name):
    """A wave has many stacks, each a copy of its weights and gradients: what a step allocates is within its bound."""
    generator = torch.Generator().manual_seed(0)
    named = [(f"layers.{k}.q_proj", torch.nn.Parameter(torch.randn(64, 64, generator=generator))) for k in range(96)]
    optimizer = OPTIMIZERS[name](named, rank=2)
    optimizer.workspace = replace(optimizer.workspace, block=1 << 16, fewest=2, bucket=4 << 20)
    for _ in range(2):  # the first one makes what stays
        for _, parameter in named:
            parameter.grad = torch.randn(64, 64, generator=generator)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            optimizer.step()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak <= optimizer.memory_report().workspace_bytes < 96 * 64 * 64 * 4 * 2
