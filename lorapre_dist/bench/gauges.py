"""LoRAPre under other gauges than its own: validation loss, and how well the factors stay conditioned.

    python -m lorapre_dist.bench gauges --ranks 16 --gauges none scalar orthonormal-A orthonormal-B

Only the product of the factors means something, so that after each refresh ``(B R, R^-1 A)`` may take their place. The
optimizer's choice is ``orthonormal-A``, in which regressing on ``A`` needs no inverse. Every run is a training of
``bench field``: ``llama-tiny`` from the same weights on the same batches, its matrices at lr 0.001 = 0.01 x 0.1 under
the dense reference's step in the state's own dtype, with the gauge as its only difference.

Norms and conditions are of the first moment, in fp64, after every 50th step and the last one; nothing is looked at once
factors have left the range of fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapre_dist import reference
from lorapre_dist.config import ConfigError, LoRAPreConfig
from lorapre_dist.config.param_groups import explain_no_match, is_low_rank
from lorapre_dist.core.factors import initial_A
from lorapre_dist.training.run.settings import BUILTIN, default_cache

from . import training
from .options import bench_parser
from .training import BASE_LR, BETAS, EPS, Training

MATRIX_LR = 0.001
EVERY = 50

Factors = tuple[Tensor, Tensor]


# gauges ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """A choice among the factors of one product.

    Attributes:
        regress: ``Y = g A^+`` of (A, g, config).
        choose: the factors that are kept, of (B, A, config).
    """

    regress: Callable[[Tensor, Tensor, LoRAPreConfig], Tensor]
    choose: Callable[[Tensor, Tensor, LoRAPreConfig], Factors]


def solved(A: Tensor, g: Tensor, config: LoRAPreConfig) -> Tensor:
    """``Y = g A^T (A A^T + damping)^-1``, for an ``A`` whose rows are not orthonormal."""
    return reference.solve_gram(A @ A.T, A @ g.T, config).T


def as_refreshed(B: Tensor, A: Tensor, config: LoRAPreConfig) -> Factors:
    """The factors as they are."""
    return B, A


def scalar(B: Tensor, A: Tensor, config: LoRAPreConfig) -> Factors:
    """``(B / s, s A)`` with the power of two ``s`` that brings the mean squared row norm of ``A`` near 1."""
    exponent = torch.log2(A.norm() / math.sqrt(A.shape[0])).round()
    return B * torch.exp2(exponent), A * torch.exp2(-exponent)


def orthonormal_B(B: Tensor, A: Tensor, config: LoRAPreConfig) -> Factors:
    """``(B L^-T, L^T A)`` with ``L L^T = B^T B + damping``: orthonormal columns of ``B``, unless it is zero."""
    gram = B.T @ B
    if gram.trace() == 0:
        return B, A
    lower = torch.linalg.cholesky(reference.damped(gram, config))
    return torch.linalg.solve_triangular(lower, B.T, upper=False).T, lower.T @ A


GAUGES = {
    "none": Gauge(solved, as_refreshed),
    "scalar": Gauge(solved, scalar),
    "orthonormal-A": Gauge(reference.regress, reference.gauge),
    "orthonormal-B": Gauge(solved, orthonormal_B),
}


# optimizer ------------------------------------------------------------------------------------------------------


def adam_step(theta: Tensor, g: Tensor, state: dict[str, Tensor], config: LoRAPreConfig, gauge: Gauge) -> None:
    """:func:`lorapre_dist.reference.lorapre_adam_step` in ``stable``, with the gauge given.

    Arguments as there, but ``g`` has been cleaned already.
    """
    beta1, beta2 = config.betas
    state["step"] += 1
    t = int(state["step"])
    B, A, vB, vA = state["m_B"], state["m_A"], state["v_B"], state["v_A"]
    Y = gauge.regress(A, g, config)

    m = (beta1 * B @ A + (1 - beta1) * g) / (1 - beta1**t) + config.resolved_residual * (g - Y @ A)
    w = beta2 * (vB @ vA).square() + (1 - beta2) * g.square()
    reference.decay_rms(state["rms_row"], g, 1, beta2)
    energy = state["rms_row"][:, None].square() / (1 - beta2**t)
    mean_w = w.mean(1, keepdim=True)
    v = energy * torch.where(mean_w > 0, w / mean_w, 1)

    gamma1, gamma2 = config.resolved_gammas
    state["m_B"], state["m_A"] = refresh(B, A, g, Y, gamma1, config, gauge)
    state["v_B"], state["v_A"] = refresh(vB, vA, g.abs(), gauge.regress(vA, g.abs(), config), gamma2, config, gauge)
    theta.mul_(1 - config.lr * config.weight_decay)
    bound = config.resolved_max_update
    theta.sub_(config.lr * config.scale * (m / (v.sqrt() + config.eps)).clamp(-bound, bound))


def refresh(B: Tensor, A: Tensor, g: Tensor, Y: Tensor, gamma: float, config: LoRAPreConfig, gauge: Gauge) -> Factors:
    """Regress ``B`` on the old ``A``, for which ``Y = g A^+`` is given, and ``A`` on the new ``B``; then the gauge."""
    B = (1 - gamma) * B + gamma * Y
    A = (1 - gamma) * A + gamma * reference.solve_gram(B.T @ B, B.T @ g, config)
    return gauge.choose(B, A, config)


@dataclass(frozen=True)
class Sample:
    """The first moment's factors after a step: norms and condition numbers, each the worst of all matrices."""

    step: int
    largest_A: float
    smallest_B: float
    cond_A: float
    cond_B: float


class Gauged(Optimizer):
    """LoRAPre ``stable`` in a given gauge, dense; every other parameter under ``torch.optim.AdamW``.

    Attributes:
        samples: of the factors, see :meth:`sample`.
        seconds: CPU time of each step of the matrices, without cleaning their gradients: an oracle's way is slow.
    """

    def __init__(self, model: nn.Module, config: LoRAPreConfig, gauge: Gauge) -> None:
        named = matrices(model, config)
        rest = [p for name, p in model.named_parameters() if name not in named]
        super().__init__([{"params": list(named.values())}, {"params": rest}], {"lr": config.lr})
        self.config, self.gauge = config, gauge
        # It takes the very group of ours, so that a schedule of ours is its own.
        self.adamw = torch.optim.AdamW(
            [self.param_groups[1]], betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        for name, p in named.items():
            m_A, v_A = (
                initial_A(name, x, r, p.shape[1], config.init_std, config.seed) for x, r in config.ranks.items()
            )
            self.state[p] = reference.init_state((p.shape[0], p.shape[1]), config, m_A, v_A, p.dtype)
        self.samples: list[Sample] = []
        self.seconds: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both steps; a matrix whose Grams have no Cholesky factor any more becomes NaN."""
        group = self.param_groups[0]
        config = replace(self.config, lr=group["lr"])
        gradients = [reference.cleaned(p.grad) for p in group["params"]]
        begin = time.process_time()
        for p, g in zip(group["params"], gradients, strict=True):
            try:
                adam_step(p, g, self.state[p], config, self.gauge)
            except torch.linalg.LinAlgError:
                p.fill_(math.nan)
        self.seconds.append(time.process_time() - begin)
        self.adamw.step()
        if len(self.seconds) % EVERY == 0:
            self.sample()

    @torch.no_grad()
    def sample(self) -> None:
        """Look at the factors as they are now, unless that has been done or some are not finite."""
        step = len(self.seconds)
        states = [self.state[p] for p in self.param_groups[0]["params"]]
        B, A = ([state[name].double() for state in states] for name in ("m_B", "m_A"))
        known = self.samples and self.samples[-1].step == step
        if not known and all(bool(x.isfinite().all()) for x in A + B):
            largest, smallest = max(float(x.norm()) for x in A), min(float(x.norm()) for x in B)
            self.samples.append(Sample(step, largest, smallest, max(map(condition, A)), max(map(condition, B))))


def matrices(model: nn.Module, config: LoRAPreConfig) -> dict[str, nn.Parameter]:
    """The parameters with low-rank momenta by name, as LoRAPre chooses them.

    Raises:
        ConfigError: there is none.
    """
    named, rank_v = dict(model.named_parameters()), config.resolved_rank_v
    chosen = {name: p for name, p in named.items() if is_low_rank(name, p.shape, config.rank, rank_v, None)}
    if not chosen:
        raise ConfigError(explain_no_match(((name, p.shape) for name, p in named.items()), config.rank, None, rank_v))
    return chosen


def condition(factor: Tensor) -> float:
    """Condition number of a factor's r x r Gram matrix."""
    values = torch.linalg.svdvals(factor)
    return float((values[0] / values[-1]).square())


# measurement and report -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One training run under a gauge: its losses, samples, and the median of ``seconds``."""

    gauge: str
    rank: int
    run: training.Run
    samples: list[Sample]
    step_ms: float


def settings(rank: int) -> LoRAPreConfig:
    """LoRAPre's, as in ``bench field``."""
    return LoRAPreConfig(lr=BASE_LR, betas=BETAS, eps=EPS, scale=MATRIX_LR / BASE_LR, rank=rank)


def measure(name: str, rank: int, task: training.Task, eval_at: tuple[int, ...] = ()) -> Result:
    """Train under the named gauge."""
    optimizers: list[Gauged] = []

    def build(model: nn.Module, lr: float) -> Optimizer:
        optimizers.append(Gauged(model, settings(rank), GAUGES[name]))
        return optimizers[0]

    label = f"{name}, rank {rank}"
    run = training.train(label, build, MATRIX_LR, task, eval_at)
    (optimizer,) = optimizers
    optimizer.sample()
    return Result(name, rank, run, optimizer.samples, 1e3 * statistics.median(optimizer.seconds))


def table(results: list[Result], eval_at: list[int]) -> str:
    """Markdown, one line per run: norms of its last sample, the worst conditions of all."""
    heads = ["gauge", "rank", *(f"loss at {step}" for step in eval_at), "validation loss (nats)"]
    heads += [
        "largest norm of A",
        "smallest norm of B",
        "worst cond(A A^T)",
        "worst cond(B^T B)",
        "matrices' step (ms)",
    ]
    lines = [heads, ["---"] * len(heads)]
    for result in results:
        on_the_way = result.run.on_the_way
        losses = [on_the_way.get(step, math.inf) for step in eval_at] + [result.run.val_loss]
        figures = ["-"] * 4
        if result.samples:
            last = result.samples[-1]
            worst = [max(getattr(x, name) for x in result.samples) for name in ("cond_A", "cond_B")]
            figures = [f"{value:.1e}" for value in (last.largest_A, last.smallest_B, *worst)]
        cells = [result.gauge, str(result.rank), *map(training.nats, losses), *figures, f"{result.step_ms:.1f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> None:
    """Train under every gauge at each rank and print the table; ``--json FILE`` writes all figures.

    Raises:
        ConfigError: a bad option, or a corpus that is too small.
    """
    args = _parse(argv)
    begin = time.perf_counter()
    kept = Training(dataset=args.dataset, batch=args.batch, seq_len=args.seq_len)
    task = training.prepare(kept, args.steps, args.seed, args.data_cache)
    for rank in args.ranks:
        matrices(task.model, settings(rank))
    results = []
    for rank in args.ranks:
        for name in args.gauges:
            results.append(measure(name, rank, task, tuple(args.eval_at)))
            run = results[-1].run
            print(f"{run.label}: {training.nats(run.val_loss)} ({run.seconds:.0f} s)", file=sys.stderr, flush=True)
    print(
        f"llama-tiny, {args.dataset} text, {args.steps} steps of {args.batch} x {args.seq_len} tokens, "
        f"matrices at lr {MATRIX_LR:g}, {len(task.held_out)} held-out sequences, seed {args.seed}, "
        f"{torch.get_num_threads()} thread(s), {(time.perf_counter() - begin) / 60:.1f} minutes\n"
    )
    print(table(results, [step for step in args.eval_at if step <= args.steps]))
    if args.json:
        figures = {"settings": vars(args), "results": [asdict(result) for result in results]}
        Path(args.json).write_text(json.dumps(training.finite(figures), indent=1), encoding="utf-8")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("gauges", __doc__)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of every run (default: 1000)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 4], help="of the first moment (default: 16 4)")
    parser.add_argument(
        "--gauges", nargs="+", choices=GAUGES, default=list(GAUGES), metavar="GAUGE", help=", ".join(GAUGES)
    )
    parser.add_argument("--eval_at", nargs="+", type=int, default=[], help="steps at which to evaluate on the way")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (default: 8)")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the data order (default: 0)")
    parser.add_argument("--dataset", default=BUILTIN, help="as in launch/pretrain.py (default: the built-in text)")
    parser.add_argument("--data_cache", default=default_cache(), help="folder for the tokenizer and tokenised text")
    parser.add_argument("--json", help="file for all figures, training losses and samples included")
    args = parser.parse_args(argv)
    if any(rank < 1 for rank in args.ranks):
        raise ConfigError(f"--ranks {' '.join(map(str, args.ranks))}: must be at least 1")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    return args
