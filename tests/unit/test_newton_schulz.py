"""Orthogonalisation through the Gram: against the direct form, its accuracy, the choice of a form, its pieces."""

from __future__ import annotations

import math

import pytest
import torch

from lorapre_dist import LoRAPreMuonConfig, reference
from lorapre_dist.core import linalg, sizes
from lorapre_dist.core.comm import Comm
from lorapre_dist.core.factors import allocate
from lorapre_dist.core.guard import Size
from lorapre_dist.core.interval import Peers, RowInterval
from lorapre_dist.core.rules.muon import cuts, orthogonal
from lorapre_dist.core.rules.muon.newton_schulz import NewtonSchulz
from lorapre_dist.core.transfer import Rectangle, Transfer
from lorapre_dist.layouts.geometry.ranges import equal_ranges

CONFIG = LoRAPreMuonConfig(rank=1)
SETTINGS = NewtonSchulz(CONFIG.ns_coefficients, CONFIG.ns_steps, CONFIG.eps)
P, Q = 256, 384


def spectra():
    """Matrices of norm 1 whose singular values are even, graded, spiked, and mostly 0."""
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(P, Q, generator=generator, dtype=torch.float64)
    U, _, Vt = torch.linalg.svd(gauss, full_matrices=False)
    spiked = torch.full((P,), 1e-2, dtype=torch.float64)
    spiked[:8] = 1
    singular = {"graded": torch.logspace(0, -6, P, dtype=torch.float64), "spiked": spiked, "rank 8": spiked > 0.5}
    return {"gauss": gauss, **{name: (U * s) @ Vt for name, s in singular.items()}}


def matrix(shape, peers=None, start=0, stop=None, columns=None):
    interval = RowInterval("x", shape, start, shape[0] * shape[1] if stop is None else stop, columns)
    kept = {"ranks": {"m": 1}, "vectors": (), "optimizer": "LoRAPreMuon", "variant": "stable", "init_std": 1, "seed": 0}
    return allocate(interval, peers, **kept, device=torch.device("cpu"), dtype=torch.float32)


def orthogonalised(x, settings=SETTINGS):
    piece = x.reshape(1, -1).clone()
    orthogonal.orthogonalise([(matrix(tuple(x.shape)), piece, Size(None, None))], settings, Comm(), 0, 1 << 20)
    return piece.view(x.shape)


def test_a_stack_is_its_matrices():
    xs = torch.randn(3, P, Q, dtype=torch.float64)
    piece = xs.reshape(3, -1).clone()
    orthogonal.orthogonalise([(matrix((P, Q)), piece, Size(None, None))], SETTINGS, Comm(), 0, 1 << 20)
    for x, found in zip(xs, piece.view(3, P, Q), strict=True):
        assert distance(found, orthogonalised(x)) <= 1e-12


def distance(x, wanted):
    return float((x.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (64, 64), (300, 520), (520, 300), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
def test_is_the_direct_form_in_fp64(shape, steps):
    x = torch.randn(shape, dtype=torch.float64)
    wanted = reference.newton_schulz(x, LoRAPreMuonConfig(rank=1, ns_steps=steps))
    assert distance(orthogonalised(x, NewtonSchulz(SETTINGS.coefficients, steps, 1e-7)), wanted) <= 1e-11


@pytest.mark.parametrize("transpose", [False, True])
def test_fp32_is_as_accurate_as_the_direct_form(transpose):
    """Rounding in the Gram's small eigenvalues, at ``a^2`` an iteration: 1e-4, did it not begin anew after three."""
    for name, x in spectra().items():
        x = x.T if transpose else x
        wanted = reference.newton_schulz(x, CONFIG)
        direct = distance(reference.newton_schulz(x.float(), CONFIG), wanted)
        assert distance(orthogonalised(x.float()), wanted) <= max(3 * direct, 1e-5), name


def test_in_half_precision_the_restart_counts(monkeypatch):
    """What GPUs do: fp16, here with products in fp16 on the CPU; torch's own Muon works in bf16."""
    monkeypatch.setattr(orthogonal, "iteration_dtype", lambda device, dtype: torch.float16)
    for name, x in spectra().items():
        wanted = reference.newton_schulz(x, CONFIG)
        bf16 = torch.optim._muon._zeropower_via_newtonschulz(x, CONFIG.ns_coefficients, CONFIG.ns_steps, CONFIG.eps)
        assert distance(orthogonalised(x.float()), wanted) <= 0.5 * distance(bf16, wanted), name


def test_singular_values_come_near_one():
    """The coefficients of Muon do not converge: 0.5 to 1.5 of what is not tiny is what they promise."""
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(P, Q)))
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalised(torch.zeros(5, 9)), torch.zeros(5, 9))


@pytest.mark.parametrize("n", [1, 7, 256, 301])
def test_packed_symmetric_matrices(n):
    x = torch.randn(2, n, n)
    x = x + x.mT
    assert torch.equal(linalg.unpacked(linalg.packed(x), torch.empty(2, n, n)), x)
    assert linalg.packed(x[:1]).numel() == sizes.packed_numel(n) <= n * n * 5 / 8 + n
    product = linalg.symmetric_product(x[0], x[0])
    assert torch.allclose(product, x[0] @ x[0], rtol=1e-4, atol=1e-5 * n)
    assert n < 256 or torch.equal(product, product.T)


def test_the_cost_model_by_hand():
    """512 x 1376 on 4 ranks: elements sent per rank, and flops."""
    packed = sizes.packed_numel
    rows = cuts.cost("rows", (512, 1376), 4, [3, 2], moved=False)
    columns = cuts.cost("columns", (512, 1376), 4, [3, 2], moved=True)
    gather = cuts.cost("gather", (512, 1376), 4, [3, 2], moved=False)
    assert rows.elements == 2 * 3 / 4 * packed(1376) * 2
    assert columns.elements == 2 * 3 / 4 * 512 * 1376 / 4 + 2 * 3 / 4 * packed(512) * 2
    assert gather.elements == 3 / 4 * 512 * 1376
    assert columns.flops == (2 * 3 * 512**2 * 1376 + 14 * 512**3) / 4 == gather.flops / 4


def test_the_form_follows_shape_and_layout():
    def choose(shape, ranks, split="rows", limit=0):
        return cuts.choose(shape, ranks, [3, 2], split, 4, limit)

    assert choose((1376, 512), 4) == choose((512, 512), 4) == "rows"
    assert choose((512, 1376), 4) == choose((2048, 5504), 4) == "columns"
    assert choose((512, 512), 2, split="columns") == choose((512, 1376), 2, split="columns") == "columns"
    assert choose((4096, 512), 2, split="columns") == "rows"
    assert choose((512, 512), 8, limit=1 << 21) == "whole"
    assert choose((512, 1376), 8, limit=1 << 21) == "columns"  # 2.7 MiB


@pytest.mark.parametrize("form", ["rows", "columns", "whole"])
@pytest.mark.parametrize(
    "ranges, columns",
    [
        (equal_ranges(35, 3), None),
        (((0, 2), (2, 3), (3, 35)), None),
        (((0, 35), (35, 35), (35, 35)), None),
        (((0, 35),) * 3, ((0, 2), (2, 5), (5, 5))),
        (((0, 15), (0, 15), (15, 35), (15, 35)), ((0, 3), (3, 5), (0, 3), (3, 5))),
    ],
    ids=["cut rows", "inside a row", "one has all", "columns", "rectangles"],
)
def test_a_transfer_moves_every_element_once_and_back(form, ranges, columns):
    """All ranks played in one process: what k sends to l is what l expects of k, and every target is filled."""
    shape, size = (7, 5), len(ranges)
    x = torch.arange(35.0).view(shape)
    routes, pieces = [], []
    for k, (start, stop) in enumerate(ranges):
        peers = Peers(None, ranges, k, columns)
        held = matrix(shape, peers, start, stop, columns and columns[k])
        routes.append(Transfer(peers, shape, cuts.targets(form, peers, shape, owner=1)))
        parts = [x[s.row : s.row + s.rows, s.col : s.col_stop].reshape(-1) for s in held.interval.segments]
        pieces.append(torch.cat(parts) if parts else x.new_empty(0))
    blocks = [torch.full(route.mine.shape, math.nan) for route in routes]
    for k in range(size):
        for to in range(size):
            for source, target in zip(
                routes[k].in_piece(pieces[k], to), routes[to].in_target(blocks[to], k), strict=True
            ):
                target.copy_(source)
    for route, block in zip(routes, blocks, strict=True):
        r: Rectangle = route.mine
        assert torch.equal(block, x[r.row : r.row_stop, r.col : r.col_stop])
    assert sum(block.numel() for block in blocks) == 35
    back = [torch.full_like(piece, math.nan) for piece in pieces]
    for k in range(size):
        for to in range(size):
            for target, source in zip(
                routes[k].in_piece(back[k], to), routes[to].in_target(blocks[to], k), strict=True
            ):
                target.copy_(source)
    assert all(torch.equal(got, piece) for got, piece in zip(back, pieces, strict=True))
