"""The dense reference against statements of the algorithm that share no code with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapre_dist import LoRAPreConfig, reference

# fp64 arithmetic on well-conditioned systems of a handful of numbers.
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(shape, config, seed=0):
    """A parameter and its state before the first step."""
    m_A = config.init_std * randn(config.rank, shape[1], seed=seed + 1)
    v_A = config.init_std * randn(config.resolved_rank_v, shape[1], seed=seed + 2)
    return randn(*shape, seed=seed), reference.init_state(shape, config, m_A, v_A)


def run(config, gradients, seed=0):
    theta, state = start(gradients[0].shape, config, seed)
    for g in gradients:
        reference.lorapre_adam_step(theta, g, state, config)
    return theta, state


def stream(steps, shape=(5, 7), seed=100):
    """Drifting low-rank signal, heavy-tailed noise."""
    signal = randn(shape[0], 2, seed=seed) @ randn(2, shape[1], seed=seed + 1)
    return [signal + 0.3 * randn(*shape, seed=seed + 2 + t).pow(3) for t in range(steps)]


# the whole step, written a second time ---------------------------------------------------------------------------


def ridge(g, A, delta):
    """argmin_Y ||g - Y A||^2 + delta ||Y||^2 row by row, as an ordinary least-squares problem."""
    r = A.shape[0]
    left = np.vstack([A.T, np.sqrt(delta) * np.eye(r)])
    return np.stack([np.linalg.lstsq(left, np.concatenate([row, np.zeros(r)]), rcond=None)[0] for row in g])


def second_opinion(theta, state, g, t, o):
    """One step on numpy arrays, element by element where that is the plainest; ``o`` holds the numbers."""
    B, A, vB, vA = (state[k] for k in ("m_B", "m_A", "v_B", "v_A"))
    paper = o["variant"] == "paper"

    def delta(gram):
        return o["damping"] if paper else o["damping"] * np.trace(gram) / len(gram)

    def regress_rows(x, factor):  # x ~ Y factor
        d = delta(factor @ factor.T)
        return ridge(x, factor, d) if d else np.zeros((len(x), len(factor)))

    def on_old(x, factor):  # in the gauge every pseudo-inverse is a transpose
        return regress_rows(x, factor) if paper else x @ factor.T

    def gauged(B, A):
        """By QR of A and of the damping's root, where the reference has a Cholesky factor."""
        d, r = delta(A @ A.T), len(A)
        R = np.linalg.qr(np.vstack([A.T, np.sqrt(d) * np.eye(r)]), mode="r")
        lower = (R * np.sign(np.diag(R))[:, None]).T
        return B @ lower, np.linalg.inv(lower) @ A

    p, q = g.shape
    M, V = B @ A, vB @ vA
    Y = on_old(g, A)
    new = theta * (1 - o["lr"] * o["weight_decay"])
    s = np.zeros(p)
    if not paper:
        s = np.array([o["beta2"] * state["rms_row"][i] ** 2 + (1 - o["beta2"]) * (g[i] ** 2).mean() for i in range(p)])
    w = np.array([[o["beta2"] * V[i, j] ** 2 + (1 - o["beta2"]) * g[i, j] ** 2 for j in range(q)] for i in range(p)])
    for i in range(p):
        for j in range(q):
            m = (o["beta1"] * M[i, j] + (1 - o["beta1"]) * g[i, j]) / (1 - o["beta1"] ** t)
            m += o["residual"] * (g[i, j] - Y[i] @ A[:, j])
            if paper:
                v = w[i, j] / (1 - o["beta2"] ** t)
            else:
                v = s[i] / (1 - o["beta2"] ** t) * (w[i, j] / w[i].mean() if w[i].any() else 1)
            update = m / (np.sqrt(v) + o["eps"])
            new[i, j] -= o["lr"] * o["scale"] * min(max(update, -o["max_update"]), o["max_update"])

    def refreshed(B, A, x, gamma):
        new_B = (1 - gamma) * B + gamma * on_old(x, A)
        left = B if paper else new_B
        new_A = (1 - gamma) * A + gamma * regress_rows(x.T, left.T).T
        return (new_B, new_A) if paper else gauged(new_B, new_A)

    m_B, m_A = refreshed(B, A, g, o["gamma1"])
    v_B, v_A = refreshed(vB, vA, np.abs(g), o["gamma2"])
    return new, {"m_B": m_B, "m_A": m_A, "v_B": v_B, "v_A": v_A, "rms_row": np.sqrt(s)}


@pytest.mark.parametrize(
    "config",
    [
        LoRAPreConfig(rank=3, lr=0.1),
        LoRAPreConfig(rank=3, rank_v=2, lr=0.1, weight_decay=0.2, residual=0.8, betas=(0.7, 0.9), gammas=(0.4, 0.1)),
        LoRAPreConfig(rank=2, lr=0.1, scale=1.0, damping=0.05, eps=0.1, max_update=0.5),
        LoRAPreConfig(rank=2, lr=0.1, variant="paper", damping=1e-2),
        LoRAPreConfig(rank=3, rank_v=1, lr=0.1, variant="paper", damping=1e-2, residual=0.4, gammas=(0.3, 0.2)),
    ],
    ids=["stable", "stable-options", "stable-bounded", "paper", "paper-options"],
)
def test_five_steps_agree_with_a_second_implementation(config):
    numbers = {
        **{k: getattr(config, k) for k in ("variant", "lr", "weight_decay", "scale", "eps")},
        **dict(zip(("beta1", "beta2"), config.betas, strict=True)),
        **dict(zip(("gamma1", "gamma2"), config.resolved_gammas, strict=True)),
        **{k: getattr(config, f"resolved_{k}") for k in ("residual", "damping", "max_update")},
    }
    theta, state = start((5, 7), config)
    other, other_state = theta.numpy().copy(), {k: v.numpy().copy() for k, v in state.items()}
    gradients = stream(5)
    gradients[0][1] = 0  # a row without gradient at first
    for t, g in enumerate(gradients, 1):
        reference.lorapre_adam_step(theta, g, state, config)
        other, other_state = second_opinion(other, other_state, g.numpy(), t, numbers)
        torch.testing.assert_close(theta, torch.from_numpy(other), **TIGHT)
        names = ["m_B", "m_A", "v_B", "v_A"] + ["rms_row"] * (config.variant == "stable")
        for name in names:
            torch.testing.assert_close(state[name], torch.from_numpy(other_state[name]), **TIGHT)
        assert int(state["step"]) == t


# the printed form, by hand ---------------------------------------------------------------------------------------


def test_paper_first_two_steps_by_hand():
    config = LoRAPreConfig(
        variant="paper", rank=1, rank_v=1, betas=(0.5, 0.5), gammas=(0.5, 0.25), damping=1.0, lr=0.1, scale=0.5, eps=0.0
    )
    theta = torch.zeros(2, 2, dtype=torch.float64)
    A, vA = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
    state = reference.init_state((2, 2), config, A, vA)
    g = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.float64)

    reference.lorapre_adam_step(theta, g, state, config)
    # m = 0.5 g / 0.5 = g and v = 0.5 g^2 / 0.5 = g^2: a step of lr * scale against the sign.
    torch.testing.assert_close(theta, -0.05 * g.sign())
    # A A^T + 1 = 6 and g A^T = (5, -5): B = 0.5 * (5, -5) / 6. B was 0, so A only decays.
    torch.testing.assert_close(state["m_B"], torch.tensor([[5.0], [-5.0]], dtype=torch.float64) / 12)
    torch.testing.assert_close(state["m_A"], torch.tensor([[0.5, 1.0]], dtype=torch.float64))
    # vA vA^T + 1 = 6 and |g| vA^T = (4, 10): vB = 0.25 * (4, 10) / 6.
    torch.testing.assert_close(state["v_B"], torch.tensor([[4.0], [10.0]], dtype=torch.float64) / 24)
    torch.testing.assert_close(state["v_A"], torch.tensor([[1.5, 0.75]], dtype=torch.float64))

    g2 = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    before = theta.clone()
    reference.lorapre_adam_step(theta, g2, state, config)
    # m = (0.5 B A + 0.5 g2) / (1 - 0.25), B A = 5/12 [[.5, 1], [-.5, -1]]
    m = (0.5 * 5 / 12 * np.array([[0.5, 1], [-0.5, -1]]) + 0.5 * g2.numpy()) / 0.75
    # v = (0.5 (vB vA)^2 + 0.5 g2^2) / 0.75, vB vA = [[.25, .125], [.625, .3125]]
    v = (0.5 * np.array([[0.25, 0.125], [0.625, 0.3125]]) ** 2 + 0.5 * g2.numpy() ** 2) / 0.75
    torch.testing.assert_close(theta, before - 0.05 * torch.from_numpy(m / np.sqrt(v)))
    # B: A A^T + 1 = 2.25, g2 A^T = (1, .5). A uses the OLD B: B^T B + 1 = 1 + 50/144, B^T g2 = 5/12 (-1, 1).
    expected_B = 0.5 * np.array([[5 / 12], [-5 / 12]]) + 0.5 * np.array([[1.0], [0.5]]) / 2.25
    expected_A = 0.5 * np.array([[0.5, 1.0]]) + 0.5 * 5 / 12 * np.array([[-1.0, 1.0]]) / (1 + 50 / 144)
    torch.testing.assert_close(state["m_B"], torch.from_numpy(expected_B))
    torch.testing.assert_close(state["m_A"], torch.from_numpy(expected_A))


def test_first_step_of_stable_follows_the_sign_of_each_element_within_its_row():
    """At step 1, with no residual, m = g and v = g^2 exactly: the row's energy cancels out of the calibration."""
    config = LoRAPreConfig(rank=2, lr=0.1, scale=0.5, residual=0.0, eps=0.0)
    theta, state = start((5, 7), config)
    before, g = theta.clone(), stream(1)[0]
    reference.lorapre_adam_step(theta, g, state, config)
    torch.testing.assert_close(theta, before - 0.05 * g.sign(), **TIGHT)


# the gauge -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.floats(1e-9, 1e9), st.integers(0, 50))
def test_the_gauge_keeps_the_product_and_makes_rows_orthonormal(r, size, seed):
    B, A = randn(6, r, seed=seed) / size, size * randn(r, 9, seed=seed + 1)
    new_B, new_A = reference.gauge(B, A, LoRAPreConfig(rank=r, damping=1e-12))
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(new_A @ new_A.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_the_transpose_in_the_gauge_is_the_damped_regression_before_it(damping):
    """``A^T A`` is the damped projection, so what a step takes off the gradient is what it was without a gauge."""
    config = LoRAPreConfig(rank=3, damping=damping)
    A, g = randn(3, 9, seed=1), randn(6, 9, seed=2)
    before = ridge(g.numpy(), A.numpy(), damping * float((A @ A.T).trace()) / 3) @ A.numpy()
    _, new_A = reference.gauge(torch.zeros(6, 3, dtype=torch.float64), A, config)
    torch.testing.assert_close(g @ new_A.T @ new_A, torch.from_numpy(before), **TIGHT)


@pytest.mark.parametrize("variant", ["stable", "paper"])
def test_under_noise_the_factors_stay_where_they_are(variant):
    """Without the gauge A grows tenfold every 46 steps in ``stable``; in ``paper`` it does not."""
    config = LoRAPreConfig(rank=3, variant=variant)
    _, state = run(config, [randn(12, 20, seed=t) for t in range(400)])
    for name in ("m_B", "m_A", "v_B", "v_A"):
        assert 1e-3 < state[name].norm() < 1e3, name


# what is far off --------------------------------------------------------------------------------------------------


def test_one_element_that_is_far_off_counts_as_nothing():
    g = randn(6, 9)
    assert torch.equal(reference.cleaned(g), g)
    for value in (1e30, -1e30, 1e12):
        off = g.clone()
        off[2, 3] = value
        found = reference.cleaned(off)
        assert found[2, 3] == 0
        found[2, 3] = g[2, 3]
        assert torch.equal(found, g)
    large = g.clone()
    large[2, 3] = 1e9
    assert torch.equal(reference.cleaned(large), large)
    sparse = torch.zeros(6, 9, dtype=torch.float64)
    sparse[2, 3] = 1e30
    assert torch.equal(reference.cleaned(sparse), sparse)  # no others to compare with


# what the cures are for ------------------------------------------------------------------------------------------


@given(st.floats(-3, 3), st.floats(0.01, 0.99), st.integers(0, 50))
def test_alternating_refresh_along_the_momentum_is_exactly_the_ema(c, beta, seed):
    """With g = -c B A: B' A' = (beta - (1 - beta) c) B A, as for the EMA itself."""
    config = LoRAPreConfig(rank=2, damping=1e-14)
    B, A = reference.gauge(randn(6, 2, seed=seed), randn(2, 9, seed=seed + 1), config)
    gamma = 1 - beta**0.5
    if abs(1 - gamma - gamma * c) < 0.05:  # B' vanishes: nothing to regress A on
        return
    new_B, new_A = reference.refresh(B, A, -c * B @ A, gamma, config)
    torch.testing.assert_close(new_B @ new_A, (beta - (1 - beta) * c) * B @ A, rtol=0, atol=1e-7)


@given(st.floats(-3, 3), st.floats(0.01, 0.99), st.integers(0, 50))
def test_simultaneous_refresh_along_the_momentum_is_quadratic(c, beta, seed):
    """The printed form: (1 - gamma - gamma c)^2 B A, never negative however strong the opposing gradient."""
    B, A = randn(6, 2, seed=seed), randn(2, 9, seed=seed + 1)
    gamma = 1 - beta**0.5
    config = LoRAPreConfig(rank=2, variant="paper", damping=1e-12)
    new_B, new_A = reference.refresh(B, A, -c * B @ A, gamma, config)
    torch.testing.assert_close(new_B @ new_A, (1 - gamma - gamma * c) ** 2 * B @ A, rtol=0, atol=1e-7)


@pytest.mark.parametrize("variant", ["stable", "paper"])
def test_refresh_expands_as_stated_for_any_gradient(variant):
    B, A, g = randn(6, 2, seed=1), randn(2, 9, seed=2), randn(6, 9, seed=3)
    gamma, pinv = 0.3, torch.linalg.pinv
    config = LoRAPreConfig(rank=2, variant=variant, damping=1e-13)
    if variant == "stable":
        B, A = reference.gauge(B, A, config)
    new_B, new_A = reference.refresh(B, A, g, gamma, config)
    rows = pinv(A) @ A
    if variant == "stable":
        expected = (1 - gamma) ** 2 * B @ A + gamma * (1 - gamma) * g @ rows + gamma * new_B @ pinv(new_B) @ g
    else:
        both = B @ pinv(B) @ g + g @ rows
        expected = (1 - gamma) ** 2 * B @ A + gamma * (1 - gamma) * both + gamma**2 * g @ pinv(B @ A) @ g
    torch.testing.assert_close(new_B @ new_A, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-5, 2.0**-30, 1e6])
def test_stable_does_not_see_the_scale_of_the_gradient(factor):
    config = LoRAPreConfig(rank=3, lr=0.1, eps=0.0)
    gradients = stream(20)
    theta, state = run(config, gradients)
    scaled, scaled_state = run(config, [factor * g for g in gradients])
    torch.testing.assert_close(scaled, theta, rtol=1e-7, atol=1e-9)
    for name, power in (("m_B", 1), ("v_B", 1), ("m_A", 0), ("v_A", 0), ("rms_row", 1)):
        torch.testing.assert_close(scaled_state[name] / factor**power, state[name], rtol=1e-5, atol=1e-9)


def test_paper_does_see_it():
    """Absolute damping: the second moment's factors stall at a small scale (why ``stable`` exists)."""
    config = LoRAPreConfig(rank=3, lr=0.1, variant="paper")
    gradients = stream(50)
    _, state = run(config, gradients)
    _, small = run(config, [1e-5 * g for g in gradients])
    size, small_size = ((s["v_B"] @ s["v_A"]).norm() for s in (state, small))
    assert small_size < 0.2e-5 * size


@given(st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 20))
def test_row_energies_are_an_exact_ema(steps, beta2, seed):
    config = LoRAPreConfig(rank=1, betas=(0.9, beta2))
    gradients = stream(steps, (3, 4), seed)
    _, state = run(config, gradients)
    expected = sum((1 - beta2) * beta2 ** (steps - 1 - t) * g.square().mean(1) for t, g in enumerate(gradients))
    torch.testing.assert_close(state["rms_row"].square(), expected, rtol=1e-12, atol=0)


def test_second_moment_of_a_row_averages_to_its_bias_corrected_energy():
    """Recovered from the step itself: with the momentum known, v_hat = (lr scale m / change)^2."""
    config = LoRAPreConfig(rank=2, rank_v=2, lr=0.1, scale=1.0, eps=0.0, residual=0.0, max_update=1e9)
    gradients = stream(8)
    theta, state = run(config, gradients[:-1])
    before, B, A = theta.clone(), state["m_B"].clone(), state["m_A"].clone()
    reference.lorapre_adam_step(theta, gradients[-1], state, config)
    m = (0.9 * B @ A + 0.1 * gradients[-1]) / (1 - 0.9**8)
    v = (0.1 * m / (before - theta)).square()
    torch.testing.assert_close(v.mean(1), state["rms_row"].square() / (1 - 0.999**8), rtol=1e-6, atol=0)


def test_residual_gives_the_part_outside_the_subspace_its_weight():
    """A gradient orthogonal to A's rows gains residual * g over the printed momentum, one inside them nothing."""
    config = LoRAPreConfig(rank=2, lr=0.1, residual=0.3, scale=1.0, eps=0.0, damping=1e-12, max_update=1e9)
    theta, state = start((5, 7), config)
    inside = randn(5, 2, seed=8) @ state["m_A"]
    outside = randn(5, 7, seed=9)
    outside -= outside @ torch.linalg.pinv(state["m_A"]) @ state["m_A"]
    for g, weight in ((inside, 1.0), (outside, 1.3)):
        change, fresh = theta.clone(), {k: v.clone() for k, v in state.items()}
        reference.lorapre_adam_step(change, g, fresh, config)
        # Step 1: without residual the change is -lr * scale * sign(g).
        torch.testing.assert_close(change - theta, -0.1 * weight * g.sign(), rtol=1e-6, atol=0)


def test_max_update_bounds_every_element():
    config = LoRAPreConfig(rank=2, lr=0.1, scale=0.5, max_update=0.25)
    theta, state = start((5, 7), config)
    loose_theta, loose_state = start((5, 7), config)
    g = stream(1)[0]
    reference.lorapre_adam_step(theta, g, state, config)
    reference.lorapre_adam_step(loose_theta, g, loose_state, replace(config, max_update=1e9))
    before = start((5, 7), config)[0]
    bounded, free = theta - before, loose_theta - before
    bound = 0.1 * 0.5 * 0.25
    assert free.abs().max() > bound
    torch.testing.assert_close(bounded, free.clamp(-bound, bound), rtol=0, atol=1e-15)
    # The state does not know of it.
    for name in state:
        assert torch.equal(state[name], loose_state[name])


# zero gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["stable", "paper"])
def test_zero_gradients_from_the_start_change_nothing_but_by_weight_decay(variant):
    config = LoRAPreConfig(rank=3, lr=0.1, variant=variant, weight_decay=0.5)
    zero = torch.zeros(5, 7, dtype=torch.float64)
    theta, state = run(config, [zero] * 10)
    torch.testing.assert_close(theta, 0.95**10 * randn(5, 7), **TIGHT)
    assert state["m_B"].count_nonzero() == state["v_B"].count_nonzero() == 0
    for name, gamma in zip(("m_A", "v_A"), config.resolved_gammas, strict=True):
        before = start((5, 7), config)[1][name]
        if variant == "paper":
            torch.testing.assert_close(state[name], (1 - gamma) ** 10 * before, **TIGHT)
        else:  # the gauge undoes the decay; what the damping had left of weak directions comes back
            torch.testing.assert_close(state[name], before, rtol=0, atol=5e-3)


@pytest.mark.parametrize("variant", ["stable", "paper"])
def test_a_zero_gradient_later_lets_the_momentum_decay_as_the_ema_would(variant):
    config = LoRAPreConfig(rank=3, lr=0.1, variant=variant)
    _, before = run(config, stream(5))
    _, after = run(config, [*stream(5), torch.zeros(5, 7, dtype=torch.float64)])
    beta1, beta2 = config.betas
    torch.testing.assert_close(after["m_B"] @ after["m_A"], beta1 * before["m_B"] @ before["m_A"], **TIGHT)
    torch.testing.assert_close(after["v_B"] @ after["v_A"], beta2**0.5 * before["v_B"] @ before["v_A"], **TIGHT)


@pytest.mark.parametrize("variant", ["stable", "paper"])
def test_a_row_without_gradient_stays_where_it_is(variant):
    config = LoRAPreConfig(rank=3, lr=0.1, variant=variant)
    gradients = stream(6)
    for g in gradients:
        g[2] = 0
    theta, state = run(config, gradients)
    assert torch.equal(theta[2], randn(5, 7)[2])
    assert state["m_B"][2].count_nonzero() == 0
    assert theta.isfinite().all()


# AdamW -----------------------------------------------------------------------------------------------------------


@given(
    st.floats(1e-6, 1), st.floats(0, 0.99), st.floats(0, 0.9999), st.floats(1e-12, 1e-2), st.floats(0, 0.5),
    st.integers(0, 9),
)  # fmt: skip
def test_adamw_step_is_that_of_pytorch(lr, beta1, beta2, eps, weight_decay, seed):
    config = LoRAPreConfig(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    theta = randn(11, seed=seed)
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([parameter], lr, (beta1, beta2), eps, weight_decay)
    zeros = torch.zeros(11, dtype=torch.float64)
    state = {"exp_avg": zeros.clone(), "exp_avg_sq": zeros.clone(), "step": torch.zeros((), dtype=torch.int64)}
    for t in range(4):
        g = randn(11, seed=seed + 10 + t)
        parameter.grad = g.clone()
        optimizer.step()
        reference.adamw_step(theta, g, state, config)
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-11, atol=1e-13)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], optimizer.state[parameter][name], rtol=1e-12, atol=1e-15)


# inputs ----------------------------------------------------------------------------------------------------------


def test_a_step_changes_theta_and_state_in_place_and_leaves_the_gradient():
    config = LoRAPreConfig(rank=2)
    theta, state = start((5, 7), config)
    g = stream(1)[0]
    kept, alias = g.clone(), theta
    reference.lorapre_adam_step(theta, g, state, config)
    assert torch.equal(g, kept)
    assert alias is theta
    assert int(state["step"]) == 1


def test_init_state_copies_the_given_factors():
    config = LoRAPreConfig(rank=2, rank_v=1)
    m_A, v_A = randn(2, 7), randn(1, 7)
    state = reference.init_state((5, 7), config, m_A, v_A)
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "m_B": (5, 2), "m_A": (2, 7), "v_B": (5, 1), "v_A": (1, 7), "rms_row": (5,), "step": ()
    }  # fmt: skip
    state["m_A"].zero_()
    assert m_A.count_nonzero() == 14
