"""Validation loss of ``llama-tiny`` after equal training under AdamW, Muon, GaLore and our optimizers.

    python -m lorapre_dist.bench quality --steps 300 --json quality.json

One process, fp32, plain PyTorch. Every run starts from the same weights and sees the same batches in the same order;
lr warms up linearly, then decays by a cosine to a tenth; gradients are clipped to norm 1. Only the optimizer of the
attention and MLP matrices differs between rows: embeddings, lm_head and norms are under AdamW at lr 0.01 in each.
The matrices' lr is ``0.01 * scale`` where an optimizer has GaLore's factor ``scale``. With the same seed, number of
threads and PyTorch build the figures repeat exactly.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lorapre_dist.config import ConfigError, extras
from lorapre_dist.training.engines.schedule import scheduler_factory
from lorapre_dist.training.run.settings import BUILTIN, default_cache, load_settings

from .contenders import BASE_LR, ROWS, Row
from .options import bench_parser

if TYPE_CHECKING:
    from lorapre_dist.training.run.settings import Settings

CLIP = 1.0
WARMUP = 40
# Largest loss above AdamW's, in nats, that the stable variant is meant to stay within.
LIMITS = {"stable-r16": 0.05, "stable-r4": 0.1}


@dataclass(frozen=True)
class Task:
    """What every run shares: initial model, batches ``(batch, seq_len)`` in order, held-out ``(n, seq_len)``."""

    model: nn.Module
    batches: list[torch.Tensor]
    held_out: np.ndarray
    warmup: int
    seed: int
    eval_at: tuple[int, ...] = ()


@dataclass
class Run:
    """One training run: losses in nats per token (infinite: diverged), ``batches`` a digest of what it trained on.

    ``on_the_way`` are validation losses by step, where ``--eval_at`` asks for them.
    """

    row: str
    matrix_lr: float
    val_loss: float
    seconds: float
    batches: str
    train_losses: list[float]
    on_the_way: dict[int, float]


# training -------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> Task:
    """Data and initial model by the pre-training program's own pipeline.

    Raises:
        ConfigError: bad options, or a corpus that is too small.
    """
    extras.need("train")
    from lorapre_dist.training.data.batches import BatchPlan
    from lorapre_dist.training.data.sequences import prepare_data
    from lorapre_dist.training.engines.models import build_model, fit_vocabulary, model_config

    settings = _settings(args)
    plan = BatchPlan(args.batch, args.batch, world_size=1, rank=0)
    config = model_config(settings)
    data = prepare_data(settings, plan, config.vocab_size)
    fit_vocabulary(config, settings, data.tokenizer)
    batches = [data.train.next_batch() for _ in range(args.steps)]
    return Task(
        build_model(config, settings), batches, data.held_out, settings.warmup_steps, args.seed, tuple(args.eval_at)
    )


def _settings(args: argparse.Namespace) -> Settings:
    options = {
        "model": getattr(args, "model", "llama-tiny"),
        "dataset": args.dataset,
        "data_cache": args.data_cache,
        "seq_len": args.seq_len,
        "max_steps": args.steps,
        "warmup_steps": min(getattr(args, "warmup", WARMUP), args.steps),
        "eval_batches": 0,
        "seed": args.seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps({"train_batch_size": args.batch, "optimizer": {"type": "AdamW"}}))
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return load_settings(["--deepspeed_config", str(path), *words], world_size=1)


def train(name: str, row: Row, lr: float, task: Task) -> Run:
    """Train a copy of the task's model at ``lr`` for the matrices, and evaluate it; stops early if it diverges."""
    begin = time.perf_counter()
    torch.manual_seed(task.seed)
    model = copy.deepcopy(task.model).train()
    optimizer = row.build(model, lr)
    scheduler = scheduler_factory(task.warmup, len(task.batches))(optimizer)
    digest = hashlib.blake2b(digest_size=8)
    losses: list[float] = []
    on_the_way: dict[int, float] = {}
    for tokens in task.batches:
        digest.update(tokens.numpy().tobytes())
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        if len(losses) in task.eval_at:
            on_the_way[len(losses)] = held_out_loss(model, task.held_out, len(tokens))
            print(
                f"{name} at {lr:g}, step {len(losses)}: {_nats(on_the_way[len(losses)])}", file=sys.stderr, flush=True
            )
            model.train()
    val_loss = held_out_loss(model, task.held_out, len(task.batches[0]))
    return Run(name, lr, val_loss, time.perf_counter() - begin, digest.hexdigest(), losses, on_the_way)


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: np.ndarray, batch: int) -> float:
    """Mean loss in nats per predicted token over all of ``held_out (n, seq_len)``; infinite where it is no number."""
    from lorapre_dist.training.run.evaluation import sequence_losses

    model.eval()
    total, device = 0.0, next(model.parameters()).device
    for start in range(0, len(held_out), batch):
        tokens = torch.from_numpy(held_out[start : start + batch].astype(np.int64)).to(device)
        total += sequence_losses(model(input_ids=tokens).logits, tokens).sum().item()
    mean = total / (len(held_out) * (held_out.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


def run_rows(names: list[str], lrs: list[float] | None, task: Task) -> list[Run]:
    """Every named row at each of its lrs (or of ``lrs``); a row whose package is missing is left out with a message."""
    runs: list[Run] = []
    for name in names:
        row = ROWS[name]
        for lr in lrs or row.lrs:
            try:
                runs.append(train(name, row, lr, task))
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "galore_torch":
                    raise
                how = "pip install 'lorapre-dist[bench]'"
                print(f"{name} skipped: galore-torch is not installed: {how}", file=sys.stderr)
                break
            last = runs[-1]
            print(f"{name} at {lr:g}: {_nats(last.val_loss)} ({last.seconds:.0f} s)", file=sys.stderr, flush=True)
    return runs


# report ---------------------------------------------------------------------------------------------------------


def best_of(runs: list[Run]) -> dict[str, Run]:
    """Of each row, the run with the lowest validation loss."""
    best: dict[str, Run] = {}
    for run in runs:
        if run.row not in best or run.val_loss < best[run.row].val_loss:
            best[run.row] = run
    return best


def table(runs: list[Run]) -> str:
    """Markdown: one line per run, the best lr of each row marked, the difference to AdamW's best beside it."""
    best = best_of(runs)
    lines = [
        "| matrices' optimizer | rank | rank_v | matrix lr | = 0.01 x scale | validation loss (nats) "
        "| best lr of row | minus AdamW's best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        row, is_best = ROWS[run.row], run is best[run.row]
        loss = f"**{_nats(run.val_loss)}**" if is_best else _nats(run.val_loss)
        behind = _signed(run.val_loss - best["adamw"].val_loss) if "adamw" in best else "-"
        cells = [
            row.label,
            row.rank or "-",
            row.rank_v or "-",
            f"{run.matrix_lr:g}",
            f"{run.matrix_lr / BASE_LR:g}",
            loss,
            "best" if is_best else "",
            behind,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def on_the_way(runs: list[Run]) -> list[str]:
    """One line per run that was evaluated before its end."""
    return [
        f"{run.row} at {run.matrix_lr:g}: "
        + ", ".join(f"{_nats(loss)} at step {step}" for step, loss in run.on_the_way.items())
        for run in runs
        if run.on_the_way
    ]


def remarks(runs: list[Run]) -> list[str]:
    """Whether each limit is met, and which best lr lies at the edge of those tried."""
    best = best_of(runs)
    lines = []
    for name, limit in LIMITS.items():
        if name in best and "adamw" in best:
            behind = best[name].val_loss - best["adamw"].val_loss
            verdict = "met" if behind <= limit else "NOT MET"
            lines.append(f"{name}: {_signed(behind)} nats against AdamW, limit {limit:+.2f}: {verdict}")
    for name, run in best.items():
        lrs = sorted(r.matrix_lr for r in runs if r.row == name)
        if len(lrs) > 1 and run.matrix_lr in (lrs[0], lrs[-1]):
            lines.append(f"{name}: the best lr tried, {run.matrix_lr:g}, is the {_edge(run.matrix_lr, lrs)} one")
    return lines


def _edge(lr: float, lrs: list[float]) -> str:
    return "lowest" if lr == lrs[0] else "highest"


def _nats(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def _signed(difference: float) -> str:
    # Adding 0 turns a rounded -0 into 0; of two diverged runs there is no difference.
    return f"{round(difference, 3) + 0.0:+.3f}" if math.isfinite(difference) else "-"


def main(argv: list[str]) -> None:
    """Train every row at each of its lrs and print the table; ``--json FILE`` writes all figures.

    Raises:
        ConfigError: a bad option, or a corpus that is too small.
    """
    args = _parse(argv)
    begin = time.perf_counter()
    task = prepare(args)
    first = held_out_loss(task.model, task.held_out, args.batch)
    runs = run_rows(args.rows, args.lrs, task)
    print(
        f"llama-tiny, {args.dataset} text, {args.steps} steps of {args.batch} x {args.seq_len} tokens, "
        f"{len(task.held_out)} held-out sequences (loss before training {first:.3f}), seed {args.seed}, "
        f"{torch.get_num_threads()} thread(s), {(time.perf_counter() - begin) / 60:.1f} minutes\n"
    )
    print("\n".join([table(runs), "", *on_the_way(runs), *remarks(runs)]))
    if args.json:
        figures = {"settings": vars(args), "loss_before": first, "runs": [asdict(run) for run in runs]}
        Path(args.json).write_text(json.dumps(_finite(figures), indent=1), encoding="utf-8")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("quality", __doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run (default: 300)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--lrs", nargs="+", type=float, help="matrices' lrs for every row (default: three of its own)")
    parser.add_argument("--eval_at", nargs="+", type=int, default=[], help="steps at which to evaluate on the way")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the data order (default: 0)")
    parser.add_argument("--dataset", default=BUILTIN, help="as in launch/pretrain.py (default: the built-in text)")
    parser.add_argument("--data_cache", default=default_cache(), help="folder for the tokenizer and tokenised text")
    parser.add_argument("--json", help="file for all figures, training losses included")
    args = parser.parse_args(argv)
    if any(not 0 < lr < math.inf for lr in args.lrs or []):
        raise ConfigError(f"--lrs {' '.join(map(str, args.lrs))}: must be positive numbers")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    return args


def _finite(value: Any) -> Any:
    """``value`` with null for infinities and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
