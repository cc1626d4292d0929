"""Model presets (Llamas of GaLore's sizes, a tiny one for CPU, Llama 2's 70B), and the recipes on C4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Shapes of a Llama (with experts: of a Mixtral), and optimizer steps: the paper's, and of 70B those of 7B."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    vocab_size: int
    steps: int
    num_key_value_heads: int | None = None
    experts: int | None = None


PRESETS = {
    "llama-tiny": Preset(128, 352, 4, 4, 1024, 2048, 1000),
    "mixtral-tiny": Preset(128, 176, 4, 4, 1024, 2048, 1000, experts=4),
    "llama-60m": Preset(512, 1376, 8, 8, 1024, 32000, 10_000),
    "llama-130m": Preset(768, 2048, 12, 12, 1024, 32000, 20_000),
    "llama-350m": Preset(1024, 2736, 16, 24, 1024, 32000, 60_000),
    "llama-1b": Preset(2048, 5461, 32, 24, 1024, 32000, 100_000),
    "llama-7b": Preset(4096, 11008, 32, 32, 2048, 32000, 150_000),
    "llama-70b": Preset(8192, 28672, 64, 80, 4096, 32000, 150_000, num_key_value_heads=8),
}

# The learning rates that the paper searches.
LR_GRID = (0.01, 0.005, 0.001, 0.0005, 0.0001)

# ZeRO stage of each model's recipe; rank, scale, batch (512 sequences) and lr are in ds_configs/.
STAGES = {"llama-60m": 2, "llama-130m": 2, "llama-350m": 2, "llama-1b": 2, "llama-7b": 3}

#: Recipes for a card that has no room for the paper's: what they say otherwise.
CARDS: dict[str, dict[str, Any]] = {
    "llama-7b-24g": {
        "model": "llama-7b",
        "deepspeed_config": "llama_7b_24g",
        "backend": "ddp",
        "seq_len": 2048,
        "gradient_checkpointing": True,
        "eval_batches": 512,
    },
}
RECIPES = (*STAGES, *CARDS)


def recipe(name: str) -> dict[str, Any]:
    """Options of the training program that run the paper's setting, which is GaLore's, for a model.

    C4, GaLore's tokenizer, sequences of 256, evaluated every 1000 steps on 10M tokens (76 global batches); the steps
    are the preset's and a tenth of them warm up, as always. Those of :data:`CARDS` have longer sequences in small
    batches, and are evaluated on 1M tokens.
    """
    return {
        "model": name,
        "deepspeed_config": f"{name.replace('-', '_')}_zero{STAGES.get(name)}",
        "dataset": "c4",
        "tokenizer": "t5-base",
        "seq_len": 256,
        "eval_every": 1000,
        "eval_batches": 76,
        "output_dir": f"runs/{name}",
        **CARDS.get(name, {}),
    }
