"""Shapes of a preset's low-rank matrices."""

from __future__ import annotations

from lorapre_dist.config import ConfigError
from lorapre_dist.training.engines.presets import PRESETS


def projections(model: str) -> list[tuple[str, tuple[int, int]]]:
    """Name and shape of every attention and MLP projection of a preset, in the model's order.

    Raises:
        ConfigError: an unknown preset.
    """
    if model not in PRESETS:
        raise ConfigError(f"model={model!r}: must be one of {', '.join(PRESETS)}")
    preset = PRESETS[model]
    h, inter = preset.hidden_size, preset.intermediate_size
    layer = {f"self_attn.{x}_proj": (h, h) for x in "qkvo"}
    layer |= {"mlp.gate_proj": (inter, h), "mlp.up_proj": (inter, h), "mlp.down_proj": (h, inter)}
    return [(f"layers.{k}.{n}.weight", shape) for k in range(preset.num_hidden_layers) for n, shape in layer.items()]
