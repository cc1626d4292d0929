"""Shapes of the model presets: GaLore's Llama sizes (its ``configs/llama_*.json``) and a tiny one for CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Shapes of a Llama, and the optimizer steps that the paper trains it for."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    vocab_size: int
    steps: int


PRESETS = {
    "llama-tiny": Preset(128, 352, 4, 4, 1024, 2048, 1000),
    "llama-60m": Preset(512, 1376, 8, 8, 1024, 32000, 10_000),
    "llama-130m": Preset(768, 2048, 12, 12, 1024, 32000, 20_000),
    "llama-350m": Preset(1024, 2736, 16, 24, 1024, 32000, 60_000),
    "llama-1b": Preset(2048, 5461, 32, 24, 1024, 32000, 100_000),
    "llama-7b": Preset(4096, 11008, 32, 32, 2048, 32000, 150_000),
}
