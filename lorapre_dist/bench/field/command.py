"""The command line of ``bench field``."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from lorapre_dist.bench.options import bench_parser
from lorapre_dist.bench.training import PRECISIONS, Training
from lorapre_dist.config import ConfigError, extras
from lorapre_dist.training.run.settings import default_cache

from . import plan, pool, report
from .registry import CONTENDERS, contender
from .setting import Setting
from .store import NAME, Record, Store


def main(argv: list[str], purpose: str) -> None:
    """Do the runs that are missing, and write tables and plots.

    Args:
        purpose: what ``--help`` says the command is for.

    Raises:
        ConfigError: a bad option, or another command is at work in the same folder.
    """
    args = _parse(argv, purpose)
    extras.need("train")
    seeds, lrs = tuple(args.seeds), tuple(args.lrs)
    protocol = plan.Protocol(
        _training(args), args.steps, args.screen_steps, seeds, lrs, args.points, args.point_sequences
    )
    store = Store(Path(args.out) / NAME)
    if args.report and not store.path.is_file():
        raise ConfigError(
            f"--out {args.out} --report: no runs are recorded there ({NAME}); leave out --report to do some"
        )
    if args.retry:
        store.forget_errors()
    if not args.report:
        fill(store, [name for name in args.rows if not contender(name).obstacle], protocol, args)
    found = report.rows(store, protocol, args.rows)
    for row in found:
        if not row.finals and not row.found.losses:
            row.error = row.error or contender(row.name).obstacle or None
    text = report.page(found, protocol)
    (store.path.parent / "field.md").write_text(text, encoding="utf-8")
    (store.path.parent / "field.csv").write_text(report.as_csv(found), encoding="utf-8")
    report.figure(found).savefig(store.path.parent / "field.svg")
    print(text)


def fill(store: Store, rows: list[str], protocol: plan.Protocol, args: argparse.Namespace) -> None:
    """Do every run that ``rows`` need and the store lacks."""
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    def wanted(under_way: set[Setting]) -> list[Setting]:
        found = [s for name in rows for s in plan.missing(name, contender(name).lrs, protocol, store.get)]
        return sorted((s for s in found if s not in under_way), key=lambda s: plan.round_of(s, protocol))

    store.path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store.path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"--out {args.out}: another bench field is at work in it; wait for it, or end it") from None
    with lock, tqdm(total=len(wanted(set())), unit="run", disable=None) as bar:

        def done(record: Record) -> None:
            store.add(record)
            bar.update()
            bar.total = bar.n + len(wanted(set()))
            bar.refresh()
            tqdm.write(line(record), file=sys.stderr)

        place = {"micro_batch": args.micro_batch or args.batch, "data_cache": args.data_cache}
        pool.work(wanted, done, args.jobs, devices(args.device, args.jobs), place, args.threads)


def line(record: Record) -> str:
    """A run in one line."""
    run = f"{record['contender']} at {record['lr']:g}, seed {record['seed']}, {record['steps']} steps"
    if "error" in record:
        return f"{run}: cannot run: {record['error']}"
    loss = "diverged" if record["val_loss"] is None else f"{record['val_loss']:.4f}"
    return f"{run}: {loss} ({record['seconds']:.0f} s of CPU)"


def devices(device: str, jobs: int) -> list[str]:
    """One device for each process: every GPU in turn where ``device`` is ``"cuda"``."""
    if device != "cuda":
        return [device]
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return [f"cuda:{i}" for i in range(min(jobs, torch.cuda.device_count()))]


def _training(args: argparse.Namespace) -> Training:
    return Training(args.model, args.dataset, args.batch, args.seq_len, args.warmup, args.precision, args.eval_batches)


def _parse(argv: list[str], purpose: str) -> argparse.Namespace:
    kept = Training()
    parser = bench_parser("field", purpose)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the runs, tables and plots")
    parser.add_argument("--report", action="store_true", help="only write tables and plots of the runs that are there")
    parser.add_argument("--retry", action="store_true", help="try again what could not run")
    parser.add_argument(
        "--rows", nargs="+", default=list(CONTENDERS), metavar="ROW", help=f"contenders: {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of the runs that are compared (default: 1000)")
    parser.add_argument("--screen_steps", type=int, default=300, help="of those that look for the lr (default: 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and data (default: 0 1 2)")
    parser.add_argument("--points", type=int, default=10, help="of the long runs' curves (default: 10)")
    parser.add_argument(
        "--point_sequences", type=int, default=64, help="held-out sequences that a point is of (default: 64; 0: all)"
    )
    parser.add_argument("--lrs", type=float, nargs="+", default=[], help="to begin with in place of a row's own")
    parser.add_argument("--model", default=kept.model, help=f"a preset (default: {kept.model})")
    parser.add_argument("--dataset", default=kept.dataset, help="as in launch/pretrain.py (default: the built-in text)")
    parser.add_argument("--batch", type=int, default=kept.batch, help=f"sequences per step (default: {kept.batch})")
    parser.add_argument("--seq_len", type=int, default=kept.seq_len, help="tokens per sequence (default: 128)")
    parser.add_argument(
        "--warmup",
        type=int,
        default=kept.warmup,
        help=f"steps of rising lr, at most a quarter of a run's (default: {kept.warmup})",
    )
    parser.add_argument("--eval_batches", type=int, default=0, help="of held-out sequences (default: all there are)")
    parser.add_argument("--precision", choices=PRECISIONS, default=kept.precision, help="of forward and backward")
    parser.add_argument("--micro_batch", type=int, help="sequences of one forward and backward (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu; or cuda: each job takes a GPU of its own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each run, on a CPU (default: 1)")
    parser.add_argument("--data_cache", default=default_cache(), help="folder for the tokenizer and tokenised text")
    args = parser.parse_args(argv)
    for name in args.rows:
        contender(name)
    for name in ("steps", "screen_steps", "points", "batch", "seq_len", "jobs", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.point_sequences < 0:
        raise ConfigError(f"--point_sequences {args.point_sequences}: must be at least 0")
    if any(not 0 < lr < math.inf for lr in args.lrs):
        raise ConfigError(f"--lrs {' '.join(map(str, args.lrs))}: must be positive numbers")
    for name in ("rows", "seeds", "lrs"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ConfigError(f"--{name} {' '.join(map(str, getattr(args, name)))}: one of them is given twice")
    return args
