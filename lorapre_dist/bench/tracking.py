"""How near other optimizers' updates are to AdamW's, on AdamW's own path.

    python -m lorapre_dist.bench tracking --rows lorapre-8 lorapre-32 lorapre-8+residual=0.1 galore-8

A model is trained by AdamW as in ``bench field``. Every other row sees the same gradients of the matrices, from the
first step on, and its update, at learning rate 1, is compared with AdamW's: in one step, and summed over ``--window``
steps, in which the gradients' noise averages out and what is missed for good remains. All matrices are one vector; of
each row the table has the cosine to AdamW's and the ratio of the norms, and of how many elements a step's update is
above 1, in thousandths: means over the windows after the warm-up.

    cosine 1, size 1     AdamW's update
    cosine c, size c     AdamW's update without a part of it
    cosine c, size > c   something else in its place, noise say
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapre_dist.config import ConfigError
from lorapre_dist.config.param_groups import param_groups
from lorapre_dist.training.run.settings import BUILTIN, default_cache

from . import training
from .field.contender import Beside, Matrices
from .field.registry import contender
from .options import bench_parser
from .training import Task, Training

BASELINE = "adamw"
ROWS = ("lorapre-8", "lorapre-32", "lorapre-8+residual=0.0", "lorapre-adafactor-8", "galore-8")


@dataclass
class Shadow:
    """An optimizer of copies of the matrices, which are put back to zero after each step.

    Attributes:
        optimizer: of ``copies``, at learning rate 1.
        copies: one for each matrix.
        update: all elements of the last step's update.
        total: of the updates since the window began.
        samples: of every window (cosine and size in its last step, of its total, thousandths above 1 in the step).
    """

    optimizer: Optimizer
    copies: list[nn.Parameter]
    update: Tensor
    total: Tensor
    samples: list[tuple[float, ...]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, model: nn.Module) -> Shadow:
        """The contender ``name`` beside ``model``."""
        named = [(key, nn.Parameter(torch.zeros_like(p))) for key, p in param_groups(model)[0]["params"]]
        known = contender(name)
        copies = [p for _, p in named]
        zero = torch.zeros(sum(p.numel() for p in copies))
        return cls(known.build(Matrices(named, known.rank(model), model.config), 1.0), copies, zero, zero.clone())

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        """Take a step on these gradients."""
        for p, g in zip(self.copies, gradients, strict=True):
            p.grad = g.clone()
        self.optimizer.step()
        self.update = torch.cat([p.detach().flatten() for p in self.copies])
        self.total += self.update
        for p in self.copies:
            p.zero_()

    def sample(self, base: Shadow) -> None:
        """Compare with the shadow of AdamW."""
        large = 1e3 * (self.update.abs() > 1).float().mean().item()
        self.samples.append((*compared(self.update, base.update), *compared(self.total, base.total), large))


def compared(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Cosine of two vectors, and the ratio of their norms."""
    return (torch.nn.functional.cosine_similarity(x, y, dim=0).item(), (x.norm() / y.norm()).item())


def track(names: list[str], lr: float, task: Task, window: int) -> dict[str, list[float]]:
    """Train by AdamW with every named contender beside it; the means of :attr:`Shadow.samples` by name."""
    torch.manual_seed(task.seed)
    model = copy.deepcopy(task.model)
    optimizer = Beside(model, lr, contender(BASELINE))
    shadows = {name: Shadow.of(name, model) for name in dict.fromkeys((BASELINE, *names))}

    def step(number: int) -> None:
        gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
        for shadow in shadows.values():
            shadow.step(gradients)
        if number % window == 0:
            for shadow in shadows.values():
                if number > task.training.warmup:
                    shadow.sample(shadows[BASELINE])
            for shadow in shadows.values():
                shadow.total.zero_()
        optimizer.step()

    for _ in training.steps(task, model, optimizer, step=step):
        pass
    return {name: [statistics.mean(x) for x in zip(*s.samples, strict=True)] for name, s in shadows.items()}


def table(found: dict[str, list[float]], window: int) -> str:
    """Markdown, a line for each row."""
    heads = ["optimizer", "cosine", "size", f"cosine over {window} steps", f"size over {window} steps", "above 1"]
    lines = [heads, ["---"] * len(heads), *([name, *(f"{x:.3f}" for x in means)] for name, means in found.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> None:
    """Print the table; ``--json FILE`` writes it.

    Raises:
        ConfigError: a bad option, or a corpus that is too small.
    """
    args = _parse(argv)
    kept = Training(dataset=args.dataset, batch=args.batch, seq_len=args.seq_len, warmup=min(40, args.steps // 4))
    task = training.prepare(kept, args.steps, args.seed, args.data_cache)
    found = track(args.rows, args.lr, task, args.window)
    about = f"{args.steps} steps of AdamW at {args.lr:g}, {args.batch} x {args.seq_len} tokens, seed {args.seed}"
    print(f"llama-tiny, {args.dataset} text, {about}\n", file=sys.stderr)
    print(table(found, args.window))
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rows": found}, indent=1), encoding="utf-8")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("tracking", __doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help="contenders of bench field")
    parser.add_argument("--steps", type=int, default=300, help="of AdamW (default: 300)")
    parser.add_argument("--window", type=int, default=50, help="steps over which updates are summed (default: 50)")
    parser.add_argument("--lr", type=float, default=0.001, help="AdamW's, of the matrices (default: 0.001)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the data order (default: 0)")
    parser.add_argument("--dataset", default=BUILTIN, help="as in launch/pretrain.py (default: the built-in text)")
    parser.add_argument("--data_cache", default=default_cache(), help="folder for the tokenizer and tokenised text")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    for name in args.rows:
        contender(name)
    if args.window < 1 or args.steps < 2 * args.window:
        raise ConfigError(f"--steps {args.steps}, --window {args.window}: at least two windows are needed")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    return args
