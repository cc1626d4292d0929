"""Whether the state of every optimizer stays sound over tens of thousands of steps of every kind of gradient.

    python -m lorapre_dist.bench soak --steps 50000 --layouts one fsdp2

Each stream of gradients drives a small fp32 matrix of its own, and one step serves all of them:

    noise      normal numbers; also on a wide and on a tall matrix
    signal     a fixed matrix of low rank, times 0.01, 0.1, 1 and 10, plus noise
    late       zeros for the first 2,000 steps (at most a quarter of all), then signal plus noise
    low-rank   of exactly half the optimizer's rank: in fixed spaces with new coefficients every step, or all of it new
    constant   in every step the same matrix, of full rank or of rank one
    heavy      cubes of normal numbers

At a look, which the end is as well, it is seen whether everything is finite, and for each moment

    how |A| / |B| varies over all looks: the largest through the least, those left out where B is 0;
    the condition of ``A A^T``, and that of ``B^T B`` over the singular values of B above 1e-6 of the largest, because
    gradients of low rank leave B's other directions empty; it is 1 where B is 0;
    the error of ``B A``, relative, after the last ten steps: against the dense reference in fp64, which takes the same
    gradients from the state that was there before them. Where nearly nothing is left of the product the error is
    relative to the gradient.

The worst of all looks is shown. Resident memory and the workspace's buffers may not grow from the first look to the
last. The exit code is 1 if they do, if anything is not finite, or if an error is above 1e-3; above 0.5 in the stream of
low rank in fixed spaces. There new coefficients bring the momentum next to a singular one now and then, and the solve
enlarges fp32's rounding, in one look of a hundred beyond 1e-3, as it does in the dense reference if that runs in fp32.

``one`` is one process, ``fsdp2`` two gloo ranks of this machine under ``fully_shard``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import pickle
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lorapre_dist import reference
from lorapre_dist.config import ConfigError
from lorapre_dist.config.checks import integer
from lorapre_dist.layouts.base import local
from lorapre_dist.optimizers import OPTIMIZERS

from .options import bench_parser

REFERENCE: dict[str, Callable[..., None]] = {
    "LoRAPre": reference.lorapre_adam_step,
    "LoRAPreMuon": reference.lorapre_muon_step,
    "LoRAPreSGD": reference.lorapre_sgd_step,
    "LoRAPreLion": reference.lorapre_lion_step,
    "LoRAPreAdafactor": reference.lorapre_adafactor_step,
}
LAYOUTS = ("one", "fsdp2")
GROUPS = ("noise", "signal", "late", "low-rank", "constant", "heavy")
RANKS = 2
SHAPE = (25, 40)  # rows that two ranks cannot share equally
LARGE = (16, (128, 352))
#: Steps that the reference goes along before a look.
HORIZON = 10
#: Steps of the late stream without a gradient.
ZEROS = 2000
#: So small that no weight goes far in a run.
LR = 1e-6
ERROR_LIMIT = 1e-3
#: Where rounding itself comes to more, see above.
LIMITS = {"low-rank": 0.5}
#: Growth of resident memory between the first look and the last, in bytes, that is no leak: allocators' own.
RSS_LIMIT = 8 << 20
TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Case:
    """A run: rank of the factors, shape of most matrices, seed, steps, steps between looks, and groups of streams."""

    rank: int
    shape: tuple[int, int]
    seed: int
    steps: int
    every: int
    groups: tuple[str, ...]

    def looks(self) -> list[int]:
        """Number of steps taken at each look."""
        return [*range(self.every, self.steps - HORIZON + 1, self.every), self.steps]


@dataclass(frozen=True)
class Stream:
    """The gradients of one p x q matrix; ``draw(g, step)`` turns normal numbers into a step's gradient, in place."""

    group: str
    name: str
    shape: tuple[int, int]
    draw: Callable[[Tensor, int], Any]


@dataclass(frozen=True)
class Sight:
    """What one look sees of one moment of a stream's matrix; ``finite`` is of all its state."""

    finite: bool
    ratio: float
    cond_A: float
    cond_B: float
    error: float


@dataclass
class Record:
    """What one process saw in a run.

    Attributes:
        sights: by group, stream and moment, one a look; none on other ranks than the first.
        weights: by group and stream, the largest weight in size of each look (NaN: one is not finite).
        rss, buffers: bytes of resident memory, and of the workspace's buffers, at each look.
    """

    sights: dict[tuple[str, str, str], list[Sight]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    rss: list[int] = field(default_factory=list)
    buffers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """The worst that was seen of a group of streams, or of one, under an optimizer in a layout."""

    layout: str
    optimizer: str
    stream: str
    finite: bool
    spread: float
    cond_A: float
    cond_B: float
    error: float
    weight: float


# gradients ------------------------------------------------------------------------------------------------------


def streams(case: Case, generator: torch.Generator) -> list[Stream]:
    """The streams of a case's groups."""
    (p, q), low = case.shape, case.rank // 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    signal, whole, line = normal(p, low) @ normal(low, q) / math.sqrt(low), normal(p, q), normal(p, 1) * normal(1, q)
    left, right = normal(p, low), normal(low, q) / math.sqrt(low)
    start = min(ZEROS, case.steps // 4)
    found = [
        Stream("noise", "noise", (p, q), lambda g, step: g),
        Stream("noise", "noise-wide", (p, 3 * q), lambda g, step: g),
        Stream("noise", "noise-tall", (3 * q, p), lambda g, step: g),
        Stream("signal", "signal-1-to-100", (p, q), lambda g, step: g.add_(signal, alpha=0.01)),
        Stream("signal", "signal-1-to-10", (p, q), lambda g, step: g.add_(signal, alpha=0.1)),
        Stream("signal", "signal-1-to-1", (p, q), lambda g, step: g.add_(signal)),
        Stream("signal", "signal-10-to-1", (p, q), lambda g, step: g.add_(signal, alpha=10)),
        Stream("late", "late", (p, q), lambda g, step: g.zero_() if step < start else g.add_(signal)),
        Stream("low-rank", "low-rank-fixed", (p, q), lambda g, step: g.copy_(left @ g[:low, :low] @ right)),
        Stream("low-rank", "low-rank-new", (p, q), lambda g, step: g.copy_(g[:, :low] @ g[:low])),
        Stream("constant", "constant", (p, q), lambda g, step: g.copy_(whole)),
        Stream("constant", "constant-rank-one", (p, q), lambda g, step: g.copy_(line)),
        Stream("heavy", "heavy", (p, q), lambda g, step: g.pow_(3)),
    ]
    return [stream for stream in found if stream.group in case.groups]


def stacks(of: list[Stream]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Zeros for every stream by name; those of a shape lie in one tensor, so that a step takes them as one stack."""
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    for stream in of:
        by_shape[stream.shape].append(stream.name)
    wholes = [torch.zeros(len(names), *shape) for shape, names in by_shape.items()]
    names = [name for some in by_shape.values() for name in some]
    return wholes, dict(zip(names, (part for whole in wholes for part in whole), strict=True))


# a run ----------------------------------------------------------------------------------------------------------


def soak(kind: str, case: Case, mesh: DeviceMesh | None = None) -> Record:
    """Step optimizer ``kind`` through a case, and look; a collective over ``mesh``, under FSDP2, if there is one."""
    generator = torch.Generator().manual_seed(case.seed)
    chosen = streams(case, generator)
    (weights, weight_of), (gradients, gradient_of) = stacks(chosen), stacks(chosen)
    for whole in weights:
        whole.normal_(std=0.02, generator=generator)
    model = nn.Module()
    for stream in chosen:
        model.register_parameter(stream.name, nn.Parameter(weight_of[stream.name]))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    for name, p in model.named_parameters():
        p.grad = _shard(gradient_of[name], p) if isinstance(p, DTensor) else gradient_of[name]
    # As many directions of the second moment as make its small solves no scalars.
    options: dict[str, Any] = {"rank_v": max(1, case.rank // 2)} if kind == "LoRAPre" else {}
    optimizer = OPTIMIZERS[kind](
        model.named_parameters(), lr=LR, rank=case.rank, seed=case.seed, target_modules=".*", **options
    )

    def walk(step: int) -> None:
        for whole in gradients:
            whole.normal_(generator=generator)
        for stream in chosen:
            stream.draw(gradient_of[stream.name], step)
        optimizer.step()

    record, taken = Record(), 0
    for look in case.looks():
        for step in range(taken, look - HORIZON):
            walk(step)
        before, seen = optimizer.full_state_dict(), []
        for step in range(look - HORIZON, look):
            walk(step)
            seen.append({name: g.double() for name, g in gradient_of.items()})
        after, taken = optimizer.full_state_dict(), look
        for stream in chosen:
            if after:
                given = [gradient[stream.name] for gradient in seen]
                moments = sights(before[stream.name], after[stream.name], given, optimizer.config)
                for moment, sight in moments.items():
                    record.sights[stream.group, stream.name, moment].append(sight)
            weight = local(getattr(model, stream.name)).detach()
            record.weights[stream.group, stream.name].append(float(weight.abs().max()))
        record.buffers.append(sum(t.untyped_storage().nbytes() for t in optimizer.workspace.buffers.values()))
        del before, after, seen
        record.rss.append(_resident())
    return record


def _shard(whole: Tensor, p: DTensor) -> DTensor:
    """A DTensor that lies as ``p`` does, of which this rank's rows are those of ``whole`` and share its memory."""
    mine = whole.chunk(p.device_mesh.size())[p.device_mesh.get_local_rank()]
    return DTensor.from_local(mine, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def sights(before: dict[str, Any], after: dict[str, Any], gradients: list[Tensor], config: Any) -> dict[str, Sight]:
    """What there is to see of each moment of a matrix whose state was ``before``, and after ``gradients`` is ``after``.

    Nothing is computed of a state that is not finite: its figures are infinite.
    """
    if not all(torch.isfinite(x).all() for state in (before, after) for x in state.values() if isinstance(x, Tensor)):
        return {moment: Sight(False, math.inf, math.inf, math.inf, math.inf) for moment in config.ranks}
    wanted = {key: x.double() if isinstance(x, Tensor) else torch.tensor(x) for key, x in before.items()}
    for g in gradients:
        REFERENCE[config.optimizer](torch.zeros_like(g), g, wanted, config)
    found = {}
    for moment in config.ranks:
        B, A = (after[f"{moment}_{side}"].double() for side in "BA")
        was, want = (state[f"{moment}_B"].double() @ state[f"{moment}_A"].double() for state in (before, wanted))
        size = float(want.norm())
        if size <= 1e-3 * float(was.norm()):
            size = float(gradients[-1].norm())
        away = float((B @ A - want).norm())
        error = away / size if size else (math.inf if away else 0.0)
        ratio = float(A.norm() / B.norm())  # infinite where B is 0
        found[moment] = Sight(True, ratio, condition(A, 0.0), condition(B, 1e-6), error)
    return found


def condition(factor: Tensor, floor: float) -> float:
    """Of the factor's Gram, in directions whose singular value is at least ``floor`` times the largest; 1 if all is 0.

    With ``floor`` 0 it is infinite where one direction is lost.
    """
    singular = torch.linalg.svdvals(factor)
    largest = float(singular[0])
    if not largest:
        return 1.0
    least = float(singular[singular >= floor * largest][-1])
    return (largest / least) ** 2 if least else math.inf


def _resident() -> int:
    """Bytes of this process that are in memory, without what was freed."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# layouts --------------------------------------------------------------------------------------------------------


def run(layout: str, kind: str, case: Case) -> list[Record]:
    """A run in a layout; the records of its processes."""
    if layout == "one":
        return [soak(kind, case)]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, kind, case), nprocs=RANKS, daemon=True)
        return [pickle.loads((Path(folder) / str(index)).read_bytes()) for index in range(RANKS)]


def _rank(index: int, folder: str, kind: str, case: Case) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=index, world_size=RANKS, timeout=TIMEOUT)
    record = soak(kind, case, init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",)))
    (Path(folder) / str(index)).write_bytes(pickle.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


# report ---------------------------------------------------------------------------------------------------------


def worst(layout: str, kind: str, records: list[Record], part: int) -> list[Row]:
    """The worst figures of each group of streams (``part`` 0), or of each stream (1), in some runs' records."""
    found = []
    for name in dict.fromkeys(key[part] for record in records for key in record.weights):
        by_moment = [s for record in records for key, s in record.sights.items() if key[part] == name]
        weights = [w for record in records for key, of in record.weights.items() if key[part] == name for w in of]
        every = [sight for some in by_moment for sight in some]
        spreads = [1.0]
        for some in by_moment:
            ratios = [sight.ratio for sight in some if math.isfinite(sight.ratio)]
            spreads += [max(ratios) / min(ratios)] if ratios else []
        bounded = all(map(math.isfinite, weights))
        found.append(
            Row(
                layout,
                kind,
                name,
                finite=bounded and all(sight.finite for sight in every),
                spread=max(spreads),
                cond_A=max(sight.cond_A for sight in every),
                cond_B=max(sight.cond_B for sight in every),
                error=max(sight.error for sight in every),
                weight=max(weights) if bounded else math.inf,
            )
        )
    return found


def growth(records: list[Record]) -> tuple[int, int]:
    """Bytes by which resident memory and the workspaces grew from the first look to the last, where they grew most."""
    return max(r.rss[-1] - r.rss[0] for r in records), max(r.buffers[-1] - r.buffers[0] for r in records)


def complaints(run: str, rows: list[Row], rss: int, buffers: int) -> list[str]:
    """What is not sound in a run's rows, and in the growth of its memory."""
    found = []
    for row in rows:
        if not row.finite:
            found.append(f"{run}, {row.stream}: not finite")
        elif row.error > LIMITS.get(row.stream, ERROR_LIMIT):
            found.append(f"{run}, {row.stream}: error {row.error:.1e}")
    if rss > RSS_LIMIT or buffers > 0:
        found.append(f"{run}: memory grew by {rss / 2**20:.1f} MiB, the workspace by {buffers:,} bytes")
    return found


LABELS = ("layout", "optimizer", "streams", "finite", "|A|/|B|", "cond A A^T", "cond B^T B", "error", "weights")


def line(row: Row) -> str:
    """A line of the table."""
    finite = "yes" if row.finite else "NO"
    figures = f"{row.spread:.2f}x", f"{row.cond_A:.3g}", f"{row.cond_B:.1e}", f"{row.error:.1e}", f"{row.weight:.2g}"
    return aligned(row.layout, row.optimizer, row.stream, finite, *figures)


def aligned(*words: str) -> str:
    """Words in the table's columns."""
    names = zip(words[:3], (7, 17, 9), strict=True)
    figures = zip(words[3:], (7, 9, 12, 12, 9, 9), strict=True)
    return "  " + "".join(f"{w:<{n}}" for w, n in names) + "".join(f"{w:>{n}}" for w, n in figures)


def main(argv: list[str]) -> None:
    """Print the table and the verdict; ``--json FILE`` writes the figures of every stream.

    Raises:
        ConfigError: a bad option.
        SystemExit: with 1, where something is not sound.
    """
    args = _parse(argv)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    details: list[dict[str, Any]] = []
    grown: list[tuple[int, int]] = []
    wrong: list[str] = []
    for rank, shape, seeds in _cases(args):
        of = f"rank {rank}, {shape[0]} x {shape[1]}"
        print(f"{args.steps:,} steps, {of}, seed {', '.join(map(str, seeds))}, a look every {args.every:,} steps")
        print(aligned(*LABELS))
        for layout in args.layouts:
            for kind in args.optimizers:
                cases = [Case(rank, shape, seed, args.steps, args.every, tuple(args.streams)) for seed in seeds]
                records = [record for case in cases for record in run(layout, kind, case)]
                rows = worst(layout, kind, records, 0)
                print("\n".join(map(line, rows)), flush=True)
                details += [{"of": of, **_finite(asdict(row))} for row in worst(layout, kind, records, 1)]
                grown.append(growth(records))
                wrong += complaints(f"{layout} {kind} ({of})", rows, *grown[-1])
    rss, buffers = (max(of) for of in zip(*grown, strict=True))
    print(f"from first to last look memory grew by {rss / 2**20:.1f} MiB at most, the workspace by {buffers:,} bytes")
    print("NOT SOUND: " + "; ".join(wrong) if wrong else "sound: finite, flat, errors within their limits", end="")
    print(f" ({(time.perf_counter() - begin) / 60:.1f} minutes)")
    if args.json:
        figures = {"settings": vars(args), "streams": details, "grown": grown, "wrong": wrong}
        Path(args.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if wrong:
        raise SystemExit(1)


def _cases(args: argparse.Namespace) -> list[tuple[int, tuple[int, int], list[int]]]:
    """Rank, shape and seeds."""
    if not args.exhaustive:
        return [(args.rank, SHAPE, [args.seed])]
    return [(args.rank, SHAPE, [args.seed, args.seed + 1, args.seed + 2]), (*LARGE, [args.seed])]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("soak", __doc__)
    parser.add_argument("--steps", type=int, default=50_000, help="default: 50,000")
    parser.add_argument("--every", type=int, default=1000, help="steps from look to look (default: 1,000)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--streams", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rank", type=int, default=4, help="of the factors (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of gradients, weights and factors (default: 0)")
    parser.add_argument("--exhaustive", action="store_true", help="three seeds, and larger matrices of rank 16 as well")
    parser.add_argument("--json", help="file for the figures of every stream")
    args = parser.parse_args(argv)
    for name, low in (("steps", HORIZON), ("every", HORIZON), ("rank", 2), ("seed", 0)):
        integer(f"--{name}", getattr(args, name), low=low)
    if args.rank >= min(SHAPE):
        raise ConfigError(f"--rank={args.rank}: must be less than {min(SHAPE)}: matrices are {SHAPE[0]} x {SHAPE[1]}")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: no such folder")
    return args


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures with null for infinities, which JSON lacks."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
