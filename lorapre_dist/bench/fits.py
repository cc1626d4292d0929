"""What fits where: for Llamas of many sizes, cards of 24 to 80 GB and 1 to 64 of them, the mildest options that fit.

    python -m lorapre_dist.bench fits --csv docs/results/data/fits.csv

By the planner, without devices: LoRAPre at a quarter of the hidden size as rank (the paper's ranks), bf16, one sequence
of 2,048 tokens a card; on one card without a framework around it, else (and where that takes host memory) under FSDP2.
92% of a card may be filled: the rest is for its context and fragmentation.
"""

from __future__ import annotations

import csv
from pathlib import Path

from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.arguments import readable
from lorapre_dist.planner import Request
from lorapre_dist.planner.fitting import Fit, mildest
from lorapre_dist.planner.models import load

from .options import bench_parser

#: Models, with the rank of the factors.
MODELS = {
    **{"llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512, "llama-7b": 1024},
    **{"llama3-8b": 1024, "llama-13b": 1280, "llama-70b": 2048},
}
CARDS = (24, 40, 80)
COUNTS = (1, 8, 64)
FILLED = 0.92
TOKENS = 2048
#: What a cell calls an option and its value.
LETTERS = {
    ("gradient_checkpointing", True): "c",
    ("release_gradients", True): "r",
    ("weights", "kahan"): "k",
    ("state_dtype", "bf16"): "b",
    ("other_state", "adamw8bit"): "a",
    ("weights", "stochastic"): "s",
    ("state_dtype", "8bit"): "8",
    ("embeddings", "low_rank"): "e",
    ("offload", True): "o",
}
COLUMNS = ("model", "GB a card", "cards", "options", "needs")


def fitting(model: str, size: int, cards: int) -> Fit:
    """The mildest options with which a model is trained on cards of ``size`` GB (of 2^30 bytes)."""
    limit, layouts = int(FILLED * size * 2**30), ("ddp", "fsdp2") if cards == 1 else ("fsdp2",)
    found = []
    for layout in layouts:
        ours = LoRAPreConfig(rank=MODELS[model])
        found.append(mildest(Request(model, load(model), layout, cards, optimizer=ours, seq_len=TOKENS), limit))
        if found[-1].fits:
            return found[-1]
    return min(found, key=lambda fit: fit.bytes)


def cell(fit: Fit) -> str:
    """Letters of the options; "no" where none are enough."""
    if not fit.fits:
        return "no"
    return " ".join(letter for option, letter in LETTERS.items() if option in fit.options.items()) or "yes"


def row(model: str, size: int, cards: int) -> dict[str, str]:
    """A line of the table."""
    fit = fitting(model, size, cards)
    return dict(zip(COLUMNS, (model, str(size), str(cards), cell(fit), readable(fit.bytes)), strict=True))


def main(argv: list[str]) -> None:
    """Print every cell; ``--csv FILE`` writes them."""
    parser = bench_parser("fits", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--csv", type=Path, help="file for the cells")
    args = parser.parse_args(argv)
    rows = []
    for model in args.models:
        for size in CARDS:
            for cards in COUNTS:
                rows.append(row(model, size, cards))
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
