"""Norms of the factors over a run of noisy gradients, with and without the gauge, by the dense reference."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from lorapre_dist import reference
from lorapre_dist.config import LoRAPreLionConfig

P, Q, STEPS = 24, 32, 600


def norms(gauged: bool) -> list[tuple[float, float]]:
    """``|A|`` and ``|B|`` after every step."""
    config = LoRAPreLionConfig(rank=4, betas=(0.9, 0.9))
    generator = torch.Generator().manual_seed(0)
    state = reference.init_state((P, Q), config, torch.randn(4, Q, generator=generator) * 0.02)
    B, A, found = state["m_B"], state["m_A"], []
    for _ in range(STEPS):
        g = torch.randn(P, Q, generator=generator, dtype=torch.float64)
        if gauged:
            B, A = reference.refresh(B, A, g, config.resolved_gamma, config)
        else:
            gamma = config.resolved_gamma
            B = (1 - gamma) * B + gamma * reference.solve_gram(A @ A.T, A @ g.T, config).T
            A = (1 - gamma) * A + gamma * reference.solve_gram(B.T @ B, B.T @ g, config)
        found.append((float(A.norm()), float(B.norm())))
    return found


def draw(out: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, gauged in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        A, B = zip(*norms(gauged), strict=True)
        axes.semilogy(A, label="norm of A")
        axes.semilogy(B, label="norm of B")
        axes.set(title="rows of A orthonormal" if gauged else "no gauge", xlabel="step")
        axes.legend()
    figure.savefig(out)
