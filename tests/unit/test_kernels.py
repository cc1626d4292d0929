"""The elementwise end of a row block: compiled and as a Triton kernel it gives what the eager form gives."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch

from lorapre_dist import LoRAPre, LoRAPreAdafactor
from lorapre_dist.config import ConfigError
from lorapre_dist.core import kernels, regression, stacks
from lorapre_dist.core.exchange import Item, Moment, Work
from lorapre_dist.core.factors import allocate
from lorapre_dist.core.guard import Go, Size, taken_for_granted
from lorapre_dist.core.interval import RowInterval
from lorapre_dist.core.rounding import Rounding
from lorapre_dist.core.rules import adamw
from lorapre_dist.core.workspace import Workspace

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
CASES = {
    "scaled": {},
    "plain": {"size": False, "bound": math.inf, "decay": 1},
    "adafactor": {"second": 0.0},
    "bf16 weights": {"dtype": torch.bfloat16},
    "rate on the device": {"decay": torch.tensor(0.9), "rate": torch.tensor(0.01)},
}
#: Stack, rows, columns and ranks: less than a tile, several with a rest, more depth than a tile's.
SHAPES = [(1, 5, 7, 2, 1), (2, 70, 130, 35, 3)]


def update_of(shape, second=0.001, bound=3.0, size=True, dtype=torch.float32, scale=1e-3, **settings):
    k, n, c, r, s = shape if second else (*shape[:-1], 1)
    generator = torch.Generator().manual_seed(n)

    def drawn(*sizes):
        return torch.randn(sizes, generator=generator)

    grad = (drawn(k, n, c + 2) * scale)[..., 1:-1]  # rows that do not lie behind each other, as of a stack's pieces
    limits = Size(torch.full((k, 1, 1), 2.0**9), torch.full((k, 1, 1), 2.5 * scale)) if size else Size(None, None)
    grad[0, 0, 0], grad[0, 1, 1] = (math.nan, 0.0) if size else (0.0, 0.0)
    low, vA = drawn(k, n, s).abs() * scale, drawn(k, s, c).abs()
    low[:, 2] = 0.0
    return kernels.Update(
        theta=drawn(k, n, c).to(dtype),
        grad=grad,
        g=limits.cleaned(grad),
        left=drawn(k, n, r) * scale,
        A=drawn(k, r, c),
        low=low,
        vA=vA,
        gain=drawn(k, n, 1).abs(),
        floor=drawn(k, n, 1).abs() * 1e-2 * scale,
        size=limits,
        second=second,
        bound=bound,
        **{"decay": 0.9, "rate": 0.01, "go": taken_for_granted(torch.device("cpu"))} | settings,
    )


def applied(form, update):
    theta = update.theta.clone()
    kernels.apply(dataclasses.replace(update, theta=theta), form, Workspace())
    return theta


def equals_eager(form, update):
    """Sums of r products in another order, and a root: some roundings; bf16 weights may round the other way."""
    expected, found = applied("eager", update), applied(form, update)
    assert not torch.equal(expected, update.theta)
    tolerance = 2e-6 if update.theta.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def interpreted(program, **environment):
    """Run a program that has this module as ``cases``. Triton reads its environment when it is first imported."""
    program = f"from tests.unit import test_kernels as cases\n{program}\n"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env={**os.environ, **environment})


def triton_equals_eager():
    for shape in SHAPES:
        for case in CASES.values():
            equals_eager("triton", update_of(shape, **case))
    for kind in (LoRAPre, LoRAPreAdafactor):
        steps_equal(kind, "triton")
        steps_equal(kind, "triton", device_decides=True)


def work_of(cut, taken, dtype=torch.float32):
    """A matrix on its way through a step, with what comes of it; the first of its rows is ``cut`` between ranks."""
    (p, q), r, s = (150, 20), 5, 3
    interval = RowInterval("layers.0.q_proj.weight", (p, q), 7 if cut else 0, p * q)
    ranks, none = {"m": r, "v": s}, torch.device("cpu")
    settings = {"optimizer": "LoRAPre", "variant": "stable", "init_std": 0.02, "seed": 0}
    matrix = allocate(interval, None, ranks=ranks, vectors=("rms_row",), device=none, dtype=torch.float32, **settings)
    generator = torch.Generator().manual_seed(1)

    def drawn(*sizes):
        return torch.randn(sizes, generator=generator)

    go = Go(torch.tensor(float(taken), dtype=torch.float64))
    numel = interval.numel
    gradient = drawn(1, numel) * 1e-7
    gradient[0, 30], gradient[0, 60] = math.nan, 1e20
    size = Size(torch.full((1, 1, 1), 2.0**23), torch.full((1, 1, 1), 1e-5 if taken else 0.0))
    plain = drawn(1, numel).to(dtype)
    item = Item(matrix, plain, gradient.to(dtype), torch.tensor([1.0]), go)
    item = stacks.stacked([dataclasses.replace(item, theta=plain[0], grad=gradient[0].to(dtype))])
    matrix = item.matrix
    for factors, width in zip(matrix.factors.values(), (r, s), strict=True):
        factors.A.copy_(torch.linalg.qr(drawn(q, width)).Q.mT)
        factors.B.copy_(drawn(1, len(factors.B[0]), width).abs() * 1e-7)
    matrix.vectors["rms_row"].copy_(drawn(1, len(matrix.vectors["rms_row"][0])).abs() * 1e-7)
    matrix.taken.fill_(4.0)
    edge = drawn(1, 1, 2 + r + s).abs() * taken
    edge[..., 2:] *= 1e-7
    edges = edge[..., 2 : 2 + r], edge[..., 2 + r :]
    moments = [Moment(f, f.A, Y) for f, Y in zip(matrix.factors.values(), edges, strict=True)]
    return Work(item, moments, size, {0: 0} if cut else {}, edge)


def stepped_by(form, cut, taken, dtype):
    """What a step of that matrix leaves, by name."""
    config = LoRAPre.config_class(rank=5, rank_v=3, lr=0.01, weight_decay=0.1, max_update=2.0, kernels=form)
    rule, work, workspace = LoRAPre.rule(config), work_of(cut, taken, dtype), Workspace(block=4000)
    regression.make_room([work], workspace, None)
    work.item.matrix.taken.add_(work.item.go.value)
    rule.begin(work, workspace)
    with mock.patch.object(kernels, "chosen", lambda option, like: option):
        for block in regression.blocks(work, workspace):
            rule.update_block(work, block, workspace)
    state = {**work.matrix.vectors, "theta": work.item.theta}
    return state | {
        f"{k} {of}": getattr(x, of) for k, m in enumerate(work.moments) for x, of in ((m.factors, "B"), (m, "Z"))
    }


def kernels_step_rows_as_the_operations_do():
    for cut, taken, dtype in itertools.product((False, True), (1, 0), (torch.float32, torch.bfloat16)):
        before = work_of(cut, taken, dtype)
        found, expected = (stepped_by(form, cut, taken, dtype) for form in ("triton", "eager"))
        for name, one in expected.items():
            limit = 1e-6 if one.dtype == torch.float32 else 2**-7
            assert one.isfinite().all()
            assert (found[name].double() - one.double()).norm() <= limit * one.double().norm(), name
        assert torch.equal(found["theta"], before.item.theta) == (not taken)
        assert torch.equal(found["0 B"], before.matrix.factors["m"].B) == (not taken)


def a_kernel_steps_vectors_as_the_operations_do():
    """Infinite and no numbers count for others; nothing changes without a step. Weights in bf16 are rounded, on a GPU
    to the nearest; the interpreter cuts bits off."""
    for taken, dtype, lr in itertools.product((1, 0), (torch.float32, torch.bfloat16), (0.01, torch.tensor(0.01))):
        results = []
        for form in ("eager", "triton"):
            generator = torch.Generator().manual_seed(0)
            theta, grad = (torch.randn(2500, generator=generator).to(dtype) for _ in range(2))
            grad[5], grad[6], grad[7] = math.nan, math.inf, -1e30
            vector = adamw.allocate(2500, theta.device, torch.float32, Rounding())
            before = theta.clone()
            hyper = adamw.Hyper(lr, (0.9, 0.999), 1e-8, 0.1)
            with mock.patch.object(kernels, "chosen", lambda option, like: option):
                for _ in range(3 if dtype == torch.float32 else 1):
                    go = Go(torch.tensor(float(taken), dtype=torch.float64))
                    adamw.step(vector, theta, grad, hyper, 4000, go, form)
            assert torch.equal(theta, before) == (not taken)
            results.append((theta, vector.exp_avg, vector.exp_avg_sq))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5 if found.dtype == torch.float32 else 2**-7, atol=1e-7)


@pytest.mark.slow
@needs_triton
def test_a_kernel_steps_vectors_as_the_operations_do():
    interpreted("cases.a_kernel_steps_vectors_as_the_operations_do()", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_kernels_step_rows_as_the_operations_do():
    """Of several blocks, whole rows and cut ones, with elements that count as 0; and a step that is not taken."""
    interpreted("cases.kernels_step_rows_as_the_operations_do()", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_triton_equals_eager():
    interpreted("cases.triton_equals_eager()", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("case", ["scaled", "adafactor", "bf16 weights"])  # each is compiled, in some seconds
def test_compiled_equals_eager(case):
    equals_eager("compile", update_of(SHAPES[1], **CASES[case]))


def test_eager_is_the_formula():
    """In fp64, of numbers as they are written down."""
    update = update_of(SHAPES[1], size=False)
    wide = {f.name: getattr(update, f.name) for f in dataclasses.fields(update)}
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in wide.items()}
    update = kernels.Update(**wide)
    m = update.gain * update.g + update.left @ update.A
    d = ((update.low @ update.vA) ** 2 + update.second * update.g**2).sqrt() + update.floor
    expected = 0.9 * update.theta - 0.01 * (m / d).clamp(-3, 3)
    torch.testing.assert_close(applied("eager", update), expected, rtol=1e-12, atol=1e-12)


def steps_equal(kind, form, device_decides=False):
    """Four steps of an optimizer with and without that form."""
    shape = (24, 40)

    def trained(kernels):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(shape) * 0.1)
        optimizer = kind([("layers.0.q_proj.weight", weight)], lr=0.01, rank=4, weight_decay=0.1, kernels=kernels)
        optimizer._decides_on_device = device_decides
        for _ in range(4):
            weight.grad = torch.randn(shape) * 1e-2
            optimizer.step()
        return weight.detach()

    # A step is 0.0025 times at most 3; what is rounded otherwise in one is in the next one's gradient direction alone.
    torch.testing.assert_close(trained(form), trained("eager"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", [LoRAPre, LoRAPreAdafactor])
def test_compiled_steps_equal_eager_ones(kind):
    steps_equal(kind, "compile")


@pytest.mark.slow
@needs_triton
def test_the_kernel_compiles_for_gpus():
    """To machine code, by the compiler that triton brings along; no GPU is asked for."""
    each = "[(80, 'ieee'), (80, 'tf32'), (90, 'ieee'), (90, 'tf32')]"
    program = f"from lorapre_dist.core.kernels import tile\nassert all(tile.machine_code(*x)['cubin'] for x in {each})"
    interpreted(program, TRITON_INTERPRET="0")


def test_which_form(monkeypatch):
    here = torch.zeros(1)
    assert kernels.chosen("auto", here) == "eager"
    assert kernels.chosen("compile", here) == "compile"
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    optimizer = LoRAPre([("layers.0.q_proj.weight", torch.nn.Parameter(torch.zeros(8, 8)))], rank=2, kernels="triton")
    for _ in range(2):  # what cannot be bound is not left half bound
        with pytest.raises(ConfigError, match=r"needs fp32 state on a CUDA device, this is torch\.float32 on cpu"):
            optimizer.memory_report()
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert "triton is not installed" in (kernels.problem("triton", here.dtype, here.device) or "")
    with pytest.raises(ConfigError, match="kernels='fast': must be one of 'auto', 'eager'"):
        LoRAPre([("layers.0.q_proj.weight", torch.nn.Parameter(torch.zeros(8, 8)))], rank=2, kernels="fast")
