"""The step on a GPU: what it computes, that no host waits for it, and that the device decides what is skipped."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lorapre_dist import LoRAPre
from lorapre_dist.optimizers import OPTIMIZERS
from tests import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = {"a.q_proj": (96, 64), "b.up_proj": (64, 160), "c.o_proj": (33, 47), "experts.up_proj": (9, 24, 40)}
BIAS = "norm.bias"
OPTIONS = {"rank": 8, "lr": 0.01, "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {**SHAPES, BIAS: (50,)}
    return {n: nn.Parameter((torch.randn(s, generator=generator) / 8).to("cuda", dtype)) for n, s in shapes.items()}


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(s, generator=generator) for n, s in {**SHAPES, BIAS: (50,)}.items()}


def give(named, step, scale=1.0):
    for name, g in gradients(step).items():
        named[name].grad = (g * scale).to("cuda", named[name].dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_takes_the_steps_of_the_reference(name):
    named = parameters()
    optimizer = OPTIMIZERS[name](list(named.items()), **OPTIONS)
    theta = {n: p.detach().double().cpu() for n, p in named.items()}
    matrices = oracle.each_expert(theta)
    config = OPTIMIZERS[name].config_class(**OPTIONS)
    state = oracle.init(matrices, config, lambda n, p: p.ndim == 2)
    for step in range(20):
        give(named, step)
        optimizer.step()
        oracle.step(matrices, oracle.each_expert({n: g.double() for n, g in gradients(step).items()}), state, config)
    # Muon iterates in fp16 there.
    limit = 1e-2 if name == "LoRAPreMuon" else 1e-5
    for n, p in named.items():
        assert (p.double().cpu() - theta[n]).norm() <= limit * theta[n].norm(), n


@pytest.mark.parametrize("variant", ["stable", "paper"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_never_waits_for_a_step(name, variant):
    named = parameters()
    optimizer = OPTIMIZERS[name](list(named.items()), **OPTIONS, variant=variant)
    for step in range(3):
        give(named, step)
        optimizer.step()
    give(named, 3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in named.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LoRAPre", "LoRAPreAdafactor"])
def test_kernels_take_the_steps_of_the_operations(name, dtype):
    """Of stacks, single matrices and vectors; in bf16 some weights are rounded the other way."""
    results, limit = [], 1e-5 if dtype == torch.float32 else 1e-3
    for form in ("eager", "triton"):
        named = parameters(dtype)
        optimizer = OPTIMIZERS[name](list(named.items()), **OPTIONS, kernels=form)
        for step in range(5):
            give(named, step)
            optimizer.step()
        results.append(named)
    for n, expected in results[0].items():
        assert (results[1][n] - expected).norm() <= limit * expected.norm(), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_a_cuda_graph(name):
    """Replayed with other gradients in the same place and another learning rate, it is the step that it would be."""
    rates, results = [0.01, 0.01, 0.01, 0.02, 0.005], []
    for captured in (False, True):
        named = parameters()
        lr = torch.tensor(0.01, device="cuda")
        optimizer = OPTIMIZERS[name](list(named.items()), **OPTIONS | {"lr": lr})
        give(named, 0)
        graph = torch.cuda.CUDAGraph()
        for step, rate in enumerate(rates):
            for n, g in gradients(step).items():
                named[n].grad.copy_(g)
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)
            if captured and step == 2:  # once all is bound, stacked and compiled
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and step >= 2:
                graph.replay()
            else:
                optimizer.step()
        torch.cuda.synchronize()
        results.append(named)
        assert all(b.state.step == len(rates) for b in optimizer.bound())
    for n, expected in results[0].items():
        assert torch.equal(results[1][n], expected), n


@pytest.mark.parametrize("where", ["a.q_proj", "experts.up_proj", BIAS])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_gradient_changes_nothing(name, value, where):
    named = parameters()
    optimizer = OPTIMIZERS[name](list(named.items()), **OPTIONS)
    for step in range(2):
        give(named, step)
        optimizer.step()

    def everything():
        state = {(b.piece.name, k): t.clone() for b in optimizer.bound() for k, t in b.state.tensors().items()}
        steps = {(b.piece.name, "step"): torch.tensor(b.state.step) for b in optimizer.bound()}
        return {**{n: p.detach().clone() for n, p in named.items()}, **state, **steps}

    before = everything()
    give(named, 2)
    named[where].grad.view(-1)[3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    after = everything()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_any_size(name, scale):
    found = []
    for factor in (1.0, scale):
        parameter = nn.Parameter(torch.zeros(64, 96, device="cuda"))
        more = {"LoRAPre": {"eps": 0.0}, "LoRAPreAdafactor": {"eps": 0.0}, "LoRAPreMuon": {"eps": 1e-37}}
        optimizer = OPTIMIZERS[name]([("q_proj", parameter)], rank=8, lr=0.01, **more.get(name, {}))
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            parameter.grad = (torch.randn(64, 96, generator=generator) * factor).cuda()
            optimizer.step()
        assert all(t.isfinite().all() for t in optimizer.factors()["q_proj"].values())
        found.append(parameter.detach().double() / (factor if name == "LoRAPreSGD" else 1.0))
    limit = 1e-2 if name == "LoRAPreMuon" else 1e-5
    assert (found[1] - found[0]).norm() <= limit * found[0].norm()


def test_noise_leaves_the_factors_where_they_are():
    parameter = nn.Parameter(torch.zeros(256, 384, device="cuda"))
    optimizer = LoRAPre([("q_proj", parameter)], rank=32)
    for _ in range(3000):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    (condition,) = (moments["m"] for moments in optimizer.conditions().values())
    assert parameter.isfinite().all() and condition.cond_A < 1.1 and condition.cond_B < 1e4
