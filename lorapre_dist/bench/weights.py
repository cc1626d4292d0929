"""Validation loss of ``llama-tiny`` with weights or optimizer state kept in fewer bits, against fp32 master weights.

    python -m lorapre_dist.bench weights --steps 1000 --seeds 0 1 2 --json weights.json

The training of ``bench field``, with LoRAPre at rank 16 and one lr. Every run starts from the same weights, bf16
numbers. In the first rows the model computes with bf16 values of the weights, and gradients are rounded to bf16 before
they reach the optimizer; the arithmetic of forward and backward is fp32 in each, for which CPUs have fast products. So
rows differ in what the optimizer keeps alone:

    master      fp32 weights, of which the model sees the nearest bf16 ones
    stochastic  bf16 weights, rounded at random
    kahan       bf16 weights, and the 16 bits that they lack
    nearest     bf16 weights, rounded to the nearest
    fp32        fp32 weights, nothing rounded

and of fp32 weights, of which nothing is rounded but

    bf16_state  factors in bf16
    8bit_state  factors in 8 bits
    tables      embedding and head with low-rank momenta
    adafactor   embedding and head with Adafactor's second moment, and no first
    adamw8bit   embedding and head with AdamW's moments in 8 bits
    8bit        that, and factors in 8 bits: all state but that of vectors

A run whose figures are in the file of ``--json`` already, with the same settings, is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lorapre_dist.config import ConfigError
from lorapre_dist.config.param_groups import param_groups
from lorapre_dist.optimizers import LoRAPre
from lorapre_dist.training.run.settings import BUILTIN, default_cache

from . import training
from .options import bench_parser
from .training import BASE_LR, BETAS, EPS, Training

RANK = 16
# Largest loss above that of master weights, in nats, that each is meant to stay within.
LIMITS = {"stochastic": 0.02, "kahan": 0.005, "8bit_state": 0.02, "tables": 0.03}


def keeping(weights: str, dtype: torch.dtype) -> Callable[[nn.Module, float], Optimizer]:
    """Builder of an optimizer that steps copies of the weights, in ``dtype``, and shows the model their bf16 values."""

    def build(model: nn.Module, lr: float) -> Optimizer:
        groups, pairs = param_groups(model), []
        for group in groups:
            kept = [(name, nn.Parameter(p.detach().to(dtype, copy=True))) for name, p in group["params"]]
            pairs += [(p, k) for (_, p), (_, k) in zip(group["params"], kept, strict=True)]
            group["params"] = kept
        optimizer = LoRAPre(groups, **_options(lr), weights=weights)

        @torch.no_grad()
        def show(*_: Any) -> None:
            for p, k in pairs:
                p.copy_(k.to(torch.bfloat16))
                p.grad = None

        def take(*_: Any) -> None:
            for p, k in pairs:
                k.grad = None if p.grad is None else p.grad.to(torch.bfloat16).to(dtype)

        optimizer.register_step_pre_hook(take)
        optimizer.register_step_post_hook(show)
        show()
        return optimizer

    return build


def with_options(**options: Any) -> Callable[[nn.Module, float], Optimizer]:
    """Builder of an optimizer with these options."""
    return lambda model, lr: LoRAPre(param_groups(model), **_options(lr), **options)


def _options(lr: float) -> dict[str, Any]:
    return {"lr": BASE_LR, "betas": BETAS, "eps": EPS, "scale": lr / BASE_LR, "rank": RANK}


LR = 0.001
#: What the rows are called, and how their optimizers are built.
ROWS: dict[str, tuple[str, Callable[[nn.Module, float], Optimizer]]] = {
    "master": ("fp32 master weights", keeping("master", torch.float32)),
    "stochastic": ("bf16, stochastic rounding", keeping("stochastic", torch.bfloat16)),
    "kahan": ("bf16, kahan", keeping("kahan", torch.bfloat16)),
    "nearest": ("bf16, rounded to the nearest", keeping("master", torch.bfloat16)),
    "fp32": ("fp32, nothing rounded", lambda model, lr: LoRAPre(param_groups(model), **_options(lr))),
    "bf16_state": ("fp32, factors in bf16", with_options(state_dtype="bf16")),
    "8bit_state": ("fp32, factors in 8 bits", with_options(state_dtype="8bit")),
    "tables": ("fp32, embeddings low-rank", with_options(embeddings="low_rank")),
    "adafactor": ("fp32, others under Adafactor", with_options(other_state="adafactor")),
    "adamw8bit": ("fp32, others under 8-bit AdamW", with_options(other_state="adamw8bit")),
    "8bit": ("fp32, all state in 8 bits", with_options(state_dtype="8bit", other_state="adamw8bit")),
}


#: Losses by row and seed.
Losses = dict[str, dict[int, float]]


def table(losses: Losses, seeds: list[int]) -> str:
    """Markdown: a line for each row, losses by seed, and their mean difference to ``master`` with its spread.

    "-" where there is no run; differences are of the seeds that both have.
    """
    lines = [
        "| weights | " + " | ".join(f"seed {seed}" for seed in seeds) + " | minus master: mean | least | most |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for name, of in losses.items():
        cells = [f"{of[seed]:.4f}" if seed in of else "-" for seed in seeds]
        behind = _behind(losses, name, seeds)
        cells += [f"{x:+.4f}" for x in (statistics.mean(behind), min(behind), max(behind))] if behind else ["-"] * 3
        lines.append("| " + " | ".join([ROWS[name][0], *cells]) + " |")
    return "\n".join(lines)


def _behind(losses: Losses, name: str, seeds: list[int]) -> list[float]:
    master = losses.get("master", {})
    return [losses[name][seed] - master[seed] for seed in seeds if seed in master and seed in losses[name]]


def remarks(losses: Losses, seeds: list[int]) -> list[str]:
    """Whether each limit is met, by the mean over the seeds."""
    found = []
    for name, limit in LIMITS.items():
        behind = _behind(losses, name, seeds) if name in losses else []
        if behind:
            mean = statistics.mean(behind)
            verdict = "met" if mean <= limit else "NOT MET"
            found.append(f"{name}: {mean:+.4f} nats against master weights, limit {limit:+.3f}: {verdict}")
    return found


def main(argv: list[str]) -> None:
    """Train every row from every seed and print the table; ``--json FILE`` writes all figures.

    Raises:
        ConfigError: a bad option, or a corpus that is too small.
    """
    args = _parse(argv)
    begin = time.perf_counter()
    runs: dict[str, dict[int, training.Run]] = {name: {} for name in args.rows}
    kept, known = Training(dataset=args.dataset, batch=args.batch, seq_len=args.seq_len), _known(args)
    for seed in args.seeds:
        missing = [name for name in args.rows if str(seed) not in known.get(name, {})]
        for name in args.rows:
            if name not in missing:
                runs[name][seed] = training.Run(**known[name][str(seed)])
        if not missing:
            continue
        task = training.prepare(kept, args.steps, seed, args.data_cache)
        for p in task.model.parameters():
            p.data = p.data.to(torch.bfloat16).float()
        for name in missing:
            run = runs[name][seed] = training.train(name, ROWS[name][1], args.lr, task)
            known.setdefault(name, {})[str(seed)] = asdict(run)
            _write(args, known)
            print(f"{name}, seed {seed}: {run.val_loss:.4f} ({run.seconds:.0f} s)", file=sys.stderr, flush=True)
    print(
        f"llama-tiny, LoRAPre rank {RANK} at matrix lr {args.lr:g}, {args.dataset} text, {args.steps} steps of "
        f"{args.batch} x {args.seq_len} tokens, {torch.get_num_threads()} thread(s), "
        f"{(time.perf_counter() - begin) / 60:.1f} minutes\n"
    )
    losses = {name: {seed: run.val_loss for seed, run in of.items()} for name, of in runs.items()}
    print("\n".join([table(losses, args.seeds), "", *remarks(losses, args.seeds)]))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a run's figures depend on, beside its row and seed."""
    return {name: getattr(args, name) for name in ("steps", "lr", "batch", "seq_len", "dataset")}


def _known(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures by row and seed in the file of ``--json``.

    Raises:
        ConfigError: it has been written with other settings, or is no such file.
    """
    if not args.json or not Path(args.json).exists():
        return {}
    try:
        found = json.loads(Path(args.json).read_text(encoding="utf-8"))
        settings, known = found["settings"], found["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--json {args.json}: is there and holds no runs of this bench; name another file") from error
    if settings != _settings(args):
        raise ConfigError(f"--json {args.json}: holds runs with other settings, {settings}; name another file")
    return dict(known)


def _write(args: argparse.Namespace, known: dict[str, dict[str, Any]]) -> None:
    if args.json:
        text = json.dumps({"settings": _settings(args), "runs": known}, indent=1)
        Path(args.json).write_text(text, encoding="utf-8")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("weights", __doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run (default: 300)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights, data order and rounding")
    parser.add_argument("--lr", type=float, default=LR, help=f"the matrices' (default: {LR:g})")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--dataset", default=BUILTIN, help="as in launch/pretrain.py (default: the built-in text)")
    parser.add_argument("--data_cache", default=default_cache(), help="folder for the tokenizer and tokenised text")
    parser.add_argument("--json", help="file for all figures, training losses included")
    args = parser.parse_args(argv)
    if not 0 < args.lr < math.inf:
        raise ConfigError(f"--lr {args.lr}: must be a positive number")
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, args.seeds))}: one of them is given twice")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    return args
