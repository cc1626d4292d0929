"""Shapes of a preset's low-rank matrices, and what their state takes by the formula of the README."""

from __future__ import annotations

from lorapre_dist.training.engines.presets import PRESETS


def projections(preset: str) -> list[tuple[str, tuple[int, int]]]:
    """Name and shape of every attention and MLP projection, in the model's order."""
    hidden, inner = PRESETS[preset].hidden_size, PRESETS[preset].intermediate_size
    layer = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    layers = range(PRESETS[preset].num_hidden_layers)
    return [(f"layers.{k}.{name}.weight", shape) for k in layers for name, shape in layer.items()]


def state_bytes(preset: str, rank: int, rank_v: int) -> int:
    """Bytes of all ranks' state together: fp32 factors and row energies, ``4 ((r + r_v)(p + q) + p)`` a matrix."""
    return sum(4 * ((rank + rank_v) * (p + q) + p) for _, (p, q) in projections(preset))
