"""Damped inverses of r x r Grams, in well and badly conditioned cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapre_dist.core import refresh


def damped_inverses(grams, damping, relative):
    return list(refresh.damped_inverses(torch.stack(grams), damping, relative))


def gauges(grams, damping):
    """``(L, L^-1)`` of each."""
    return list(refresh.unpacked(refresh.gauges(torch.stack(grams), damping)))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def damped(gram, damping, relative):
    """``G + delta I`` as ALGORITHM.md states it."""
    delta = damping * gram.trace() / gram.shape[0] if relative else damping
    return gram + delta * torch.eye(gram.shape[0], dtype=gram.dtype)


@given(st.integers(1, 8), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_inverts_the_damped_gram(r, n, relative, seed):
    """Also where the Gram is singular (n < r): the condition number is at most 1e3 r (relative) or about 1e5."""
    X = randn(n, r, seed=seed)
    gram = X.T @ X
    (inverse,) = damped_inverses([gram], 1e-3, relative)
    eye = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(inverse @ damped(gram, 1e-3, relative), eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-12, atol=1e-12 * float(inverse.abs().max()))


def test_every_gram_is_damped_by_its_own_scale():
    X = randn(9, 4)
    grams = [1e-12 * X.T @ X, X.T @ X, 1e12 * X.T @ X]
    for gram, inverse in zip(grams, damped_inverses(grams, 1e-4, relative=True), strict=True):
        torch.testing.assert_close(inverse, torch.linalg.inv(damped(gram, 1e-4, True)), rtol=1e-10, atol=0)


def test_relative_damping_does_not_see_the_scale():
    X = randn(9, 4)
    # Powers of two (of four, so that their roots are as well): exact.
    small, large = damped_inverses([X.T @ X, 2.0**40 * X.T @ X], 1e-4, relative=True)
    assert torch.equal(small, 2.0**40 * large)


def test_absolute_damping_is_added_as_it_is():
    gram = torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64))
    (inverse,) = damped_inverses([gram], 0.25, relative=False)
    torch.testing.assert_close(inverse, torch.diag(torch.tensor([1 / 4.25, 4.0], dtype=torch.float64)))


def test_a_zero_gram_contributes_a_zero_term():
    zero = torch.zeros(3, 3)
    (inverse,) = damped_inverses([zero], 1e-4, relative=True)
    assert inverse.isfinite().all()
    assert torch.equal(torch.zeros(5, 3) @ inverse, torch.zeros(5, 3))
    (inverse,) = damped_inverses([zero], 1e-6, relative=False)
    torch.testing.assert_close(inverse, 1e6 * torch.eye(3))


def test_a_zero_gram_does_not_disturb_the_others():
    X = randn(9, 4)
    gram = X.T @ X
    alone = damped_inverses([gram], 1e-4, relative=True)[0]
    beside = damped_inverses([torch.zeros(4, 4, dtype=torch.float64), gram], 1e-4, relative=True)[1]
    assert torch.equal(alone, beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_inputs_are_kept(dtype):
    gram = torch.eye(3, dtype=dtype)
    (inverse,) = damped_inverses([gram], 1e-4, relative=True)
    assert inverse.dtype == dtype
    assert torch.equal(gram, torch.eye(3, dtype=dtype))


# bad conditioning -----------------------------------------------------------------------------------------------


def dominated(r, strength, dtype=torch.float32):
    """A (r x 4r) with one direction ``strength`` times the others: what |g| and the early momentum look like."""
    A = randn(r, 4 * r, seed=3)
    u, v = randn(r, 1, seed=4), randn(1, 4 * r, seed=5)
    return (A + strength * u @ v / r).to(dtype)


@pytest.mark.parametrize("strength", [0, 1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("rank", [32, 128, 256, 512])
def test_one_dominant_direction_in_fp32_leaves_a_bounded_inverse(rank, strength):
    """Finite, positive, and no larger than the damping allows: 1 / delta in the weak directions."""
    A = dominated(rank, strength)
    gram = A @ A.T
    (inverse,) = damped_inverses([gram], 1e-4, relative=True)
    assert inverse.isfinite().all()
    wide = inverse.double()
    delta = 1e-4 * float(gram.double().trace()) / rank
    values = torch.linalg.eigvalsh((wide + wide.T) / 2) * delta
    # Rounding of the Gram, 6e-8 of its trace at most, is up to 30% of the damping at rank 512; of the inverse, 6e-8.
    assert values.min() > -1e-6
    assert values.max() < 1.5
    if strength == 1e6:  # the others are far below the damping, which was not raised where Cholesky can do without
        assert values.max() > 0.7


@pytest.mark.parametrize(
    ("strength", "tolerance"),
    [
        # Condition below 1e3: a few units in fp32's last place.
        *[(0, 1e-5), (1e2, 1e-5)],
        # Condition up to r / damping = 2.6e6, of which the rounded inverse costs up to all: 2.6e6 * 6e-8 = 0.15. (The
        # Cholesky factor's inverse, applied twice, costs its root only: 1e-4 and 6e-6 were measured at the last two.)
        *[(1e3, 1e-3), (1e4, 2e-2), (1e6, 0.15)],
    ],
)
def test_one_dominant_direction_at_rank_256_in_fp32_is_fitted(strength, tolerance):
    A = dominated(256, strength)
    (inverse,) = damped_inverses([A @ A.T], 1e-4, relative=True)
    g = randn(64, 1024, seed=6, dtype=torch.float32) + 0.1 * randn(64, 256, seed=7, dtype=torch.float32) @ A
    fitted = g @ A.T @ inverse @ A
    wide = A.double()
    exact = torch.linalg.solve(damped(wide @ wide.T, 1e-4, True), wide @ g.double().T).T @ wide
    assert (fitted - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("relative", [True, False])
def test_a_gram_that_rounding_left_indefinite_gives_less_than_any_inverse(relative):
    good = randn(12, 6)
    gram = good.T @ good
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -1e-3 * values[-1]  # more than the damping makes up for
    bad = vectors @ torch.diag(values) @ vectors.T
    inverse, kept = damped_inverses([bad, gram], 1e-6, relative)
    torch.testing.assert_close(inverse, torch.eye(6, dtype=torch.float64) / bad.trace(), rtol=1e-5, atol=1e-12)
    # The others in the batch are not touched.
    torch.testing.assert_close(kept, torch.linalg.inv(damped(gram, 1e-6, relative)), rtol=1e-9, atol=1e-12)
    (lower, back), _ = gauges([bad, gram], 1e-6)
    torch.testing.assert_close(lower @ back, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3, 64, 300])
def test_a_gauge_is_a_triangular_factor_and_its_inverse(rank, dtype):
    A = randn(rank, 2 * rank + 1, dtype=dtype)
    for size in (1e-12, 1.0, 1e12):
        ((lower, inverse),) = gauges([size * A @ (size * A).T], 1e-6)
        orthonormal = inverse @ (size * A)
        # The damping, and at rank 300 in fp32 the rounding of a Gram of condition 34: 1e-4 at most.
        torch.testing.assert_close(orthonormal @ orthonormal.T, torch.eye(rank, dtype=dtype), rtol=0, atol=2e-4)
        torch.testing.assert_close(lower @ inverse, torch.eye(rank, dtype=dtype), rtol=0, atol=1e-4)
        assert torch.equal(lower, lower.tril()) and lower.dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 1e8, 1e20])
def test_absolute_damping_lost_in_rounding_still_gives_an_inverse(scale):
    """``paper``: 1e-6 is nothing beside a large Gram in fp32."""
    A = scale**0.5 * dominated(64, 1e5)
    gram = A @ A.T
    (inverse,) = damped_inverses([gram], 1e-6, relative=False)
    assert inverse.isfinite().all()
    wide = inverse.double()
    assert torch.linalg.eigvalsh((wide + wide.T) / 2).min() > 0
    # It still shrinks what it is applied to: no direction comes out larger than 1 / (rounding of the Gram).
    assert wide.norm() < 1e9 / gram.double().norm()


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [(0, 0), (2, 2), (2, 1), (3, 3)])
def test_a_gram_that_is_not_finite_neither_hangs_nor_raises(where, value, relative):
    gram = torch.eye(4)
    gram[where] = gram[where[::-1]] = value
    inverse, healthy = damped_inverses([gram, torch.eye(4)], 1e-4, relative)
    torch.testing.assert_close(healthy, torch.eye(4) / (1 + 1e-4))
    if value != value:  # not mistaken for something healthy
        assert not (torch.ones(1, 4) @ inverse).isfinite().all()


@pytest.mark.parametrize("relative", [True, False])
def test_nan_everywhere(relative):
    (inverse,) = damped_inverses([torch.full((4, 4), float("nan"))], 1e-4, relative)
    assert (torch.ones(2, 4) @ inverse).isnan().all()
