"""Muon's dense reference against numpy, which shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorapre_dist import LoRAPreMuonConfig, reference

from .test_reference import randn, stream


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("variant", ["paper", "stable"])
def test_muon_agrees_with_a_second_implementation(variant, nesterov):
    """Algorithm 2 in numpy, orthogonalised by an SVD and Muon's polynomial on the singular values."""
    config = LoRAPreMuonConfig(
        rank=3, lr=0.1, momentum=0.9, weight_decay=0.2, variant=variant, damping=1e-3, nesterov=nesterov
    )
    p, q, mu, gamma = 9, 5, 0.9, 1 - 0.9**0.5
    theta, A, B = randn(p, q, seed=1), randn(3, q, seed=2) * 0.02, torch.zeros(p, 3, dtype=torch.float64)
    state = reference.init_state((p, q), config, A)
    mine = theta.numpy().copy()
    a, b = A.numpy().copy(), B.numpy().copy()

    def gauged(b, a):
        lower = np.linalg.cholesky(a @ a.T + 1e-3 * np.trace(a @ a.T) / 3 * np.eye(3))
        return b @ lower, np.linalg.solve(lower, a)

    if variant == "stable":
        b, a = gauged(b, a)
    for t, g in enumerate(stream(5, (p, q))):
        reference.lorapre_muon_step(theta, g, state, config)
        g = g.numpy()
        target = g / (1 - mu)

        def damped(gram):
            return np.linalg.inv(gram + 1e-3 * np.eye(3) * (1 if variant == "paper" else np.trace(gram) / 3))

        m = mu * b @ a + g
        u, s, vt = np.linalg.svd(mu * m + g if nesterov else m, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        new_b = (1 - gamma) * b + gamma * target @ a.T @ (damped(a @ a.T) if variant == "paper" else np.eye(3))
        left = b if variant == "paper" else new_b
        grown = gamma * damped(left.T @ left) @ left.T @ target if t or variant == "stable" else 0
        a, b = (1 - gamma) * a + grown, new_b
        if variant == "stable":
            b, a = gauged(b, a)
        mine = mine * (1 - 0.1 * 0.2) - 0.1 * np.sqrt(p / q) * (u * s) @ vt
        np.testing.assert_allclose(theta.numpy(), mine, rtol=0, atol=1e-10)
        np.testing.assert_allclose((state["m_B"] @ state["m_A"]).numpy(), b @ a, rtol=0, atol=1e-9)
