"""Each relative's first steps against numbers worked out by hand, and what its dense form must keep."""

from __future__ import annotations

import math

import pytest
import torch

from lorapre_dist import reference
from lorapre_dist.bench.family import mlorc, smmf
from lorapre_dist.bench.family.dense import Dense
from lorapre_dist.bench.family.dion import Dion
from lorapre_dist.bench.family.exchanged import Exchanged
from lorapre_dist.bench.family.hfac import HFac
from lorapre_dist.bench.family.mlorc import MLorc
from lorapre_dist.bench.family.mofasgd import MoFaSGD
from lorapre_dist.bench.family.smmf import SMMF
from lorapre_dist.config import ConfigError, LoRAPreConfig

LR = 0.1


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def steps(rule, *gradients, state=None):
    """Where ``rule`` goes from zero, after each gradient; and its state."""
    theta = torch.zeros_like(gradients[0])
    state = rule.begin(theta, gradients[0]) if state is None else state
    places = []
    for t, g in enumerate(gradients, 1):
        rule.step(theta, g, state, LR, t)
        places.append(theta.clone())
    return places, state


def close(found, *rows):
    torch.testing.assert_close(found, matrix(*rows), rtol=0, atol=5e-5)


def are_adams(places, gradients):
    """Whether these are the places to which Adam goes from zero."""
    theta = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    adam = torch.optim.Adam([theta], lr=LR, betas=(0.9, 0.99), eps=1e-8)
    for place, g in zip(places, gradients, strict=True):
        theta.grad = g
        adam.step()
        torch.testing.assert_close(place, theta.detach())


def test_dion():
    """B Q = (3, 4), so P = (0.6, 0.8); R = B^T P = (5, 0.6), of norm 5.0359."""
    g = matrix([3.0, 1.0], [4.0, 0.0])
    (theta,), state = steps(Dion(1), g, state={"M": torch.zeros_like(g), "Q": matrix([1.0], [0.0])})
    # P Q^T = (0.6, 0.8)^T (0.99287, 0.11914)
    close(theta, [-0.059572, -0.007149], [-0.079430, -0.009532])
    # M = B - 0.05 P R^T
    close(state["M"], [2.85, 0.982], [3.8, -0.024])
    # The column may point either way, as P may.
    close(state["Q"].abs(), [0.99287], [0.11914])


def test_dion_steps_sqrt_p_over_q():
    g = torch.ones(4, 1, dtype=torch.float64)
    (theta,), _ = steps(Dion(1), g)
    # P Q^T = (1/2, 1/2, 1/2, 1/2), times sqrt(4 / 1)
    torch.testing.assert_close(theta, -LR * torch.ones(4, 1, dtype=torch.float64))


def test_mofasgd():
    """The momentum 0.9 (0.2 e1 e1^T) + 0.1 (e2 e1^T + e1 e2^T) has the eigenvalue 0.22454, along (1, 0.44536)."""
    places, state = steps(MoFaSGD(1), matrix([2.0, 0.0], [0.0, 1.0]), matrix([0.0, 1.0], [1.0, 0.0]))
    close(places[0], [-0.1, 0.0], [0.0, 0.0])
    # (1, 0.44536) normalised is (0.91350, 0.40684)
    close(places[1] - places[0], [-0.083449, -0.037165], [-0.037165, -0.016552])
    assert state["S"].item() == pytest.approx(0.22454, abs=5e-5)


def test_mofasgd_follows_the_projection_on_the_tangent_space():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    rule = MoFaSGD(2)
    state = rule.begin(g, g)
    U, S, V = state["U"], state["S"], state["V"]
    new = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    projected = U @ U.T @ new + new @ V @ V.T - U @ U.T @ new @ V @ V.T
    left, s, right = torch.linalg.svd(0.9 * (U * S) @ V.T + 0.1 * projected)
    rule.step(torch.zeros_like(g), new, state, LR, 2)
    torch.testing.assert_close((state["U"] * state["S"]) @ state["V"].T, (left[:, :2] * s[:2]) @ right[:2])


def test_mlorc_is_adam_where_both_moments_have_its_rank():
    """Gradients that are multiples of one matrix of rank 1, whose squares are, too."""
    torch.manual_seed(0)
    g = torch.outer(matrix([1.0, -2.0, 3.0])[0], matrix([0.5, 1.0])[0])
    gradients = [g, -0.5 * g, 2 * g]
    places, _ = steps(MLorc(1), *gradients)
    are_adams(places, gradients)


def test_mlorc_puts_the_mean_size_of_what_was_negative_in_its_place():
    close(mlorc.rectified(matrix([-2.0, 4.0], [-4.0, 1.0])), [3.0, 4.0], [3.0, 1.0])
    close(mlorc.rectified(matrix([2.0, 0.0])), [2.0, 0.0])


def test_smmf():
    """|M| = 0.1 |G| has row sums 0.3, 0.7 and column sums 0.4, 0.6 of 1; G^2 has 5, 25 and 10, 20 of 30."""
    first, second = matrix([1.0, -2.0], [3.0, 4.0]), matrix([1.0, 1.0], [-1.0, 2.0])
    places, state = steps(SMMF(), first, second)
    # V = G^2, as beta2 is 0 at first
    close(places[0], [-0.01, 0.01], [-0.01, -0.01])
    beta1, beta2 = 0.9 * 0.999, 1 - 2**-0.8
    expected = []
    for i, (r, rv) in enumerate(((0.3, 5), (0.7, 25))):
        for j, (c, cv) in enumerate(((0.4, 10 / 30), (0.6, 20 / 30))):
            sign, g = math.copysign(1, first[i, j]), second[i, j].item()
            m = beta1 * sign * r * c + (1 - beta1) * g
            expected.append(-LR * m / math.sqrt(beta2 * rv * cv + (1 - beta2) * g * g))
    torch.testing.assert_close((places[1] - places[0]).flatten(), torch.tensor(expected, dtype=torch.float64))
    assert state["sign"].tolist() == [[True, False], [True, True]]


def test_smmf_makes_matrices_square():
    assert [smmf.square(n) for n in (64, 128 * 352, 7)] == [(8, 8), (256, 176), (7, 1)]


def test_hfac():
    """At first ``b`` is 0, and V = [[5 x 10, 5 x 20], [25 x 10, 25 x 20]] / 30."""
    first, second = matrix([1.0, 2.0], [3.0, 4.0]), matrix([2.0, 0.0], [0.0, 2.0])
    places, _ = steps(HFac(), first, second)
    close(places[0], [-0.077460, -0.109545], [-0.103923, -0.097980])
    b1, b2 = 0.9 * 0.1 / 0.19, 0.999 * 0.001 / (1 - 0.999**2)
    u, v = [b1 * x + (1 - b1) for x in (1.5, 3.5)], [b1 * x + (1 - b1) for x in (2, 3)]
    r, s = [b2 * x + (1 - b2) * 4 for x in (5, 25)], [b2 * x + (1 - b2) * 4 for x in (10, 20)]
    update = [[second[i, j].item() / math.sqrt(r[i] * s[j] / sum(r)) for j in range(2)] for i in range(2)]
    rms = math.sqrt(sum(x * x for row in update for x in row) / 4)
    expected = [
        [
            -LR * (b1 * (u[i] - 1) / math.sqrt(r[i] / 2) / 2 + b1 * (v[j] - 1) / math.sqrt(s[j] / 2) / 2)
            - LR * update[i][j] / max(1, rms)
            for j in range(2)
        ]
        for i in range(2)
    ]
    close(places[1] - places[0], *expected)


#: Rules with the lr that they begin with; steps of orthonormal factors have a norm of their own.
RULES = [(Dion(2), 0.2), (MoFaSGD(2), 0.2), (MLorc(2), 0.05), (SMMF(), 0.05), (HFac(), 0.05)]


@pytest.mark.parametrize(("rule", "lr"), RULES, ids=lambda x: type(x).__name__)
def test_each_finds_the_least_of_a_quadratic_and_repeats_exactly(rule, lr):
    def run():
        torch.manual_seed(0)
        goal = torch.randn(12, 3) @ torch.randn(3, 8)
        theta = torch.nn.Parameter(torch.zeros(12, 8))
        optimizer = Dense([theta], lr, rule)
        losses = []
        for t in range(200):
            optimizer.param_groups[0]["lr"] = lr * (1 - t / 200)
            theta.grad = theta.detach() - goal
            losses.append(theta.grad.square().mean().item())
            optimizer.step()
        return losses

    losses = run()
    assert losses[-1] < 0.05 * losses[0]
    assert run() == losses


LOW_RANK = LoRAPreConfig(lr=LR, scale=1.0, rank=3, rank_v=2, betas=(0.9, 0.99))


def gradients(number, shape=(9, 7), seed=0):
    return list(torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_nothing_exchanged_is_the_reference():
    given = gradients(5)
    rule = Exchanged(LOW_RANK)
    places, _ = steps(rule, *given)
    theta, state = torch.zeros(9, 7, dtype=torch.float64), rule.begin(given[0], given[0])
    for place, g in zip(places, given, strict=True):
        reference.lorapre_adam_step(theta, g, state, LOW_RANK)
        torch.testing.assert_close(place, theta)


def test_both_moments_exchanged_is_adam():
    """Where no element of the update is as large as ``max_update``."""
    given = gradients(4)
    places, _ = steps(Exchanged(LOW_RANK, "full", "full"), *given)
    are_adams(places, given)


def test_subspace_keeps_a_momentum_of_its_rank_whole():
    """Gradients with three columns' space: the product is their average, to which coupled rates only come near."""
    left, right = gradients(2, (9, 3))[0], gradients(2, (3, 7), seed=1)[0]
    given = [left @ core @ right for core in gradients(30, (3, 3), seed=2)]
    average = torch.zeros(9, 7, dtype=torch.float64)
    for g in given:
        average.lerp_(g, 0.1)

    def away(m):
        _, state = steps(Exchanged(LOW_RANK, m), *given)
        return float((state["m_B"] @ state["m_A"] - average).norm() / average.norm())

    assert away("subspace") < 0.02 < 0.05 < away("factors")


def test_an_exchange_that_there_is_not():
    with pytest.raises(ConfigError, match="m='none'"):
        Exchanged(LOW_RANK, "none")
