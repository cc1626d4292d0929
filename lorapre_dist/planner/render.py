"""A plan as a table, as JSON and as a chart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorapre_dist.config import ConfigError, LowRankConfig, extras
from lorapre_dist.config.arguments import readable
from lorapre_dist.config.options import WORKS

from .arrange import arranged
from .axes import axis_of
from .fitting import RUNGS, Fit
from .ours import looked_at
from .plan import MOMENTS, PARTS, Usage, names, plan
from .request import Request
from .seconds import Rates, seconds

Usages = dict[str, Usage]
Fits = dict[str, "int | None"]

TITLES = {
    "zero0": "ZeRO-0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "hsdp": "HSDP",
    "tp": "tensor parallel",
    "ddp": "DDP",
}
# Seconds before a chart says how far it is: a plan of thousands of ranks and experts takes some.
PATIENCE = 2.0
COLOURS = ("C0", "C1", "C2", "C3")
# What the column "buffers" is, by layout.
BUFFERS = {
    "zero0": "gradients packed for the all-reduce",
    "zero1": "DeepSpeed's reduce bucket (reduce_bucket_size)",
    "zero2": "DeepSpeed's reduce bucket (reduce_bucket_size)",
    "zero3": "DeepSpeed's reduce bucket, and weights gathered for computation (at most stage3_max_live_parameters)",
    "fsdp1": "whole weights and gradients of two layers and of what is in no layer",
    "fsdp2": "whole weights and gradients of two layers and of what is in no layer",
    "hsdp": "whole weights and gradients of two layers and of what is in no layer",
    "tp": "weights in the precision of computation",
    "ddp": "DDP's buckets",
}


def notes(request: Request, rates: Rates | None = None) -> list[str]:
    """What the figures are and what they leave out."""
    predicted = []
    if rates is not None:
        predicted = [
            "seconds: predicted, not measured, of the optimizer's step alone, without any overlap, from these rates: "
            + ", ".join(f"{name} {value:.3g}" for name, value in vars(rates).items())
        ]
    arrangement = arranged(request.stages[0])
    looked = len(looked_at(arrangement, 0, request.optimizer.work == "rows"))
    if 1 < looked < arrangement.size:
        predicted.append(f"workspace and sent: of {looked:,} ranks, which stand for their neighbours, too")
    return [
        *predicted,
        "memory: at the moment at which a rank holds most: in the forward pass, the backward pass or the step",
        *_of_axes(request),
        *_of_work(request),
        *_of_activations(request),
        f"buffers: {BUFFERS[request.layout]}",
        "sent: by a rank in rings over n, (n-1)/n of what is gathered or reduce-scattered, twice that of an all-reduce",
        "AdamW and Muon (torch.optim.Muon, AdamW on the rest): by formula, with the same weights and layout",
        f"GaLore (galore-torch): under DDP, all of it on every rank, weights and state in {request.precision} alone",
    ]


def _of_axes(request: Request) -> list[str]:
    """What a plan of several axes takes for granted."""
    found = []
    if request.pipeline > 1:
        found.append(
            f"pipeline: 1F1B, of which (P-1)/(M+P-1) = {request.bubble:.1%} is bubble, with P = {request.pipeline} "
            f"stages and M = {request.accumulation} micro-batches; layers dealt out by parameters, as DeepSpeed does"
        )
    if request.tensor > 1:
        split = "projections and the head" if request.layout.startswith("zero") else "projections"
        found.append(f"tensor: {split} are split; a matrix's factors lie on its tensor- and data-parallel ranks alike")
    if request.expert > 1:
        found.append(
            f"expert: stacks lie over {request.expert} ranks, and their matrices over the others; what tokens take on "
            "their way is not planned for"
        )
        return found
    if found and request.seq_len is None:
        found.append("what is sent along these axes, activations, is planned for with --seq_len")
    return found


def _of_work(request: Request) -> list[str]:
    """What steps by matrices would send, where that is much less."""
    ours = request.optimizer
    if ours.work == "matrices" or ours.overlap or request.sharing == 1:
        return []
    kind = ours.optimizer
    rows, matrices = (plan(replace(request, optimizer=replace(ours, work=work)), (kind,))[kind] for work in WORKS)
    sent, less = (sum(float(np.max(values)) for values in usage.sent.values()) for usage in (rows, matrices))
    if less > WORTH * sent:
        return []
    more = float(np.max(matrices.memory["workspace"])) - float(np.max(rows.memory["workspace"]))
    return [
        f"work: by matrices (--work matrices) the optimizer sends {less / 2**20:,.0f} MiB a step instead of "
        f"{sent / 2**20:,.0f}, and takes {abs(more) / 2**20:,.0f} MiB {'more' if more > 0 else 'less'} of workspace"
    ]


#: Of what steps by rows send: so much, at most, is worth a word.
WORTH = 0.5


def _of_activations(request: Request) -> list[str]:
    rest = "the accelerator's context and fragmentation are not included"
    if request.seq_len is None:
        return [f"activations (--seq_len plans for them), {rest}"]
    how = "recomputed block by block" if request.checkpointing else "all kept (--gradient_checkpointing: recomputed)"
    batch = f"{request.micro_batch:,} x {request.seq_len:,} tokens, {how}"
    return [f"activations: of a Llama by formula, {batch}; attention that keeps no scores (flash)", rest]


def as_json(
    request: Request,
    usages: dict[str, Usage],
    fits: dict[str, int | None],
    limit: int | None,
    rates: Rates | None = None,
    options: Fit | None = None,
) -> dict[str, Any]:
    """The plan as plain values, all sizes in bytes and times in seconds."""
    ours = request.optimizer
    found: dict[str, Any] = {
        "model": request.model,
        "elements": request.elements,
        "low_rank_matrices": request.matrices,
        "low_rank_elements": request.low_rank_elements,
        "layout": request.layout,
        "world_size": request.world_size,
        "precision": request.precision,
        "offload": request.offload,
        "accumulation": request.accumulation,
        "rank": ours.rank,
        "rank_v": ours.resolved_rank_v,
        "variant": ours.variant,
        "optimizers": {name: usage.summary() for name, usage in usages.items()},
        "notes": notes(request, rates),
    }
    if request.axis_sizes:
        found["axes"] = {"data": request.world_size // request.model_ranks, **request.axis_sizes}
    if request.pipeline > 1:
        stages = {name: _of_stages(request, usage) for name, usage in usages.items() if usage.stages > 1}
        found["pipeline"] = {"bubble": request.bubble, "stages": stages}
    if rates is not None:
        found["rates"] = dict(vars(rates))
        for name, usage in usages.items():
            time = seconds(usage, rates)
            found["optimizers"][name]["seconds_per_step"] = {**vars(time), "step": time.step}
    if limit is not None:
        found["max_memory"] = {"bytes": limit, "smallest_world_size": fits}
    if options is not None:
        found["max_memory"] |= {"fits": options.fits, "options": options.options, "total": options.bytes}
    return found


def table(
    request: Request,
    usages: Usages,
    fits: Fits,
    limit: int | None,
    rates: Rates | None = None,
    options: Fit | None = None,
) -> str:
    """The plan for people."""
    ours, share = request.optimizer, request.low_rank_elements / request.elements
    ranks = _so_many_ranks(request)
    lines = [
        f"{request.model}: {request.elements:,} parameters, {share:.1%} of them in {request.matrices:,} matrices of "
        f"{_ranks_of(ours)}, {ours.variant}",
        f"{TITLES[request.layout]}{', offload' if request.offload else ''}, {ranks}, {request.precision}, "
        f"{request.accumulation} micro-batch{'es' if request.accumulation > 1 else ''} per step",
    ]
    lines += [
        "",
        *_memory(usages),
        *_by_stage(request, usages),
        "",
        *_sent(request, usages),
        *([] if rates is None else _seconds(usages, rates)),
    ]
    fitting = _fitting(request, fits, limit, options)
    return "\n".join([*lines, *fitting, "", *(f"note: {line}" for line in notes(request, rates))])


def _so_many_ranks(request: Request) -> str:
    ranks = f"{request.world_size:,} rank{'s' if request.world_size > 1 else ''}"
    sizes = {"data": request.world_size // request.model_ranks, **request.axis_sizes}
    return f"{ranks} = {' x '.join(f'{name} {n}' for name, n in sizes.items())}" if request.axis_sizes else ranks


def _ranks_of(ours: LowRankConfig) -> str:
    return f"rank {ours.rank}" + (f", rank_v {ours.resolved_rank_v}" if ours.resolved_rank_v else "")


def _seconds(usages: Usages, rates: Rates) -> list[str]:
    headings = ("compute", "solves", "collectives", "step", "framework's")
    lines = ["", f"{'predicted ms of a step':<27}" + "".join(f"{heading:>12}" for heading in headings) + "  bound by"]
    for label, usage in usages.items():
        time = seconds(usage, rates)
        cells = (time.compute, time.solves, time.network, time.step, time.framework)
        lines.append(f"  {label:<25}" + "".join(f"{1e3 * cell:>12.2f}" for cell in cells) + f"  {time.bound}")
    return lines


def _memory(usages: Usages) -> list[str]:
    hosted = any(usage.host.any() for usage in usages.values())
    parts = [part for part in PARTS if any(usage.at_peak[part].any() for usage in usages.values())]
    headings = [*parts, "total", *(["host"] if hosted else []), "mean state", "mean total"]
    lines = [f"{'memory of the fullest rank':<27}" + "".join(f"{heading:>12}" for heading in headings) + "  peak in"]
    for label, usage in usages.items():
        at = usage.fullest
        cells = [*(usage.at_peak[part][at] for part in parts), usage.total[at]]
        cells += [usage.host[at]] if hosted else []
        cells += [usage.at_peak["state"].mean(), usage.total.mean()]
        lines.append(f"  {label:<25}" + "".join(f"{_size(cell):>12}" for cell in cells) + f"  {usage.when}")
    return lines


def _of_stages(request: Request, usage: Usage) -> list[dict[str, Any]]:
    """Of each stage of a pipeline what it is, and the fullest of its ranks."""
    found = []
    for stage, at in zip(request.stages, usage.fullest_of_stages, strict=True):
        parts = {part: int(values[at]) for part, values in usage.at_peak.items()}
        peak = {"total": int(usage.total[at]), "host": int(usage.host[at]), "peak": MOMENTS[int(usage.peak[at])]}
        of = {"elements": stage.elements, "micro_batches_held": stage.in_flight}
        found.append({"first": stage.parameters[0].name, **of, "rank": at, **parts, **peak})
    return found


def _by_stage(request: Request, usages: Usages) -> list[str]:
    """Of our optimizer, the fullest rank of each stage of a pipeline."""
    if request.pipeline == 1:
        return []
    ours = next(iter(usages))
    rows = _of_stages(request, usages[ours])
    parts = [part for part in PARTS if any(row[part] for row in rows)]
    headings = ["parameters", "held", *parts, "total"]
    lines = ["", f"{'stages of the pipeline':<27}" + "".join(f"{heading:>12}" for heading in headings) + "  peak in"]
    worst = max(rows, key=lambda row: row["total"] + row["host"])
    for k, row in enumerate(rows):
        cells = [f"{row['elements'] / 1e6:,.0f}M", str(row["micro_batches_held"])]
        cells += [_size(row[part]) for part in (*parts, "total")]
        label = f"{ours}, stage {k}{' (worst)' if row is worst else ''}"
        lines.append(f"  {label:<25}" + "".join(f"{cell:>12}" for cell in cells) + f"  {row['peak']}")
    return lines


def _sent(request: Request, usages: Usages) -> list[str]:
    """The framework's collectives once, by axis, and again for an optimizer under which they differ."""

    def of_framework(usage: Usage) -> list[tuple[str, Any, Any]]:
        return [(purpose, np.max(n), np.mean(n)) for purpose, n in usage.frame_sent.items()]

    common = of_framework(next(iter(usages.values())))
    shown = []
    for purpose, most, mean in common:
        shown.append((f"framework, {axis_of(purpose)}" if request.axis_sizes else "framework", purpose, most, mean))
    for label, usage in usages.items():
        if of_framework(usage) != common:
            shown += [(f"framework, {label}", *row) for row in of_framework(usage)]
        shown += [(label, purpose, x.max(), x.mean()) for purpose, x in usage.sent.items()]
    if not shown:
        return ["sent per step and rank: nothing"]
    lines = [f"{'sent per step and rank':<51}{'largest':>12}{'mean':>12}"]
    return lines + [f"  {who:<25}{what:<24}{_size(most):>12}{_size(mean):>12}" for who, what, most, mean in shown]


def _fitting(request: Request, fits: Fits, limit: int | None, options: Fit | None) -> list[str]:
    if limit is None or options is None:
        return []
    which = f"{request.optimizer.optimizer}, {TITLES[request.layout]}, {_so_many_ranks(request)}"
    if options.fits:
        how = f"with {options}: {_size(options.bytes)}" if options.options else "as it is"
        said = f"{which}: fits in {_size(limit)} {how}"
    else:
        said = f"{which}: does not fit in {_size(limit)}; the least is {_size(options.bytes)}, with {options}"
    order = ", ".join(name if value is True else f"{name}={value}" for name, value in RUNGS)
    found = [f"{TITLES[k]} from {n:,} rank{'s' if n > 1 else ''}" for k, n in fits.items() if n]
    ours = request.optimizer.optimizer
    ranks = ", ".join(found) or "in no layout up to 4,096 ranks"
    return ["", said, f"(tried in this order: {order})", f"{ours} fits in {_size(limit)} as it is: {ranks}"]


def _size(count: float) -> str:
    return readable(int(count)) if count else "-"


def chart(request: Request, path: Path) -> None:
    """Draw memory per rank against world size, and against the optimizer's rank, into ``path``.

    Raises:
        ConfigError: the file cannot be written, or matplotlib knows no such format.
    """
    extras.need("train", "matplotlib", "tqdm", why="--plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from tqdm import tqdm

    worlds, ranks = _worlds(request), _ranks(request)
    with tqdm(total=len(worlds) + len(ranks), desc="chart", unit="plan", delay=PATIENCE, leave=False) as bar:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
        _against_world(request, left, worlds, bar)
        _against_rank(request, right, ranks, bar)
    figure.suptitle(
        f"{request.model}, {TITLES[request.layout]}, {request.precision}: largest rank, without activations"
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error}") from error
    finally:
        plt.close(figure)


def _worlds(request: Request) -> list[int]:
    copies, ranks = request.world_size // request.model_ranks, request.model_ranks
    last = max(64, request.world_size) // ranks
    return sorted(ranks * n for n in {1 << k for k in range(last.bit_length()) if 1 << k <= last} | {copies})


def _ranks(request: Request) -> list[int]:
    smallest = min(min(p.shape[-2:]) for p in request.parameters if request.is_low_rank(p))
    floor = getattr(request.optimizer, "rank_v", None) or 1
    return sorted({1 << k for k in range(2, 20) if max(1 << k, floor - 1) < smallest} | {request.optimizer.rank})


def _planned(requests: Iterable[Request], bar: Any) -> Iterator[Usages]:
    for request in requests:
        yield plan(request)
        bar.update()


def _against_world(request: Request, axes: Any, worlds: list[int], bar: Any) -> None:
    plans = list(_planned((replace(request, world_size=world) for world in worlds), bar))
    for name, colour in zip(names(request), COLOURS, strict=True):
        axes.plot(worlds, [p[name].total.max() / 2**30 for p in plans], "o-", color=colour, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"ranks (rank {request.optimizer.rank})")
    axes.set_ylabel("memory of the fullest rank (GiB)")
    axes.grid(alpha=0.3)
    _legend(axes)


def _against_rank(request: Request, axes: Any, ranks: list[int], bar: Any) -> None:
    """Total and state, on average; ``rank_v`` follows its default where it is not given."""
    settings = (replace(request.optimizer, rank=rank) for rank in ranks)
    plans = list(_planned((replace(request, optimizer=ours) for ours in settings), bar))
    for name, colour in zip(names(request), COLOURS, strict=True):
        axes.plot(ranks, [p[name].total.mean() / 2**30 for p in plans], "o-", color=colour, markersize=4, label=name)
        if not request.offload:
            states = [p[name].memory["state"].mean() / 2**30 for p in plans]
            axes.plot(ranks, states, "o--", color=colour, markersize=4, label=f"{name}, state")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"rank ({request.world_size:,} ranks share the model)")
    axes.set_ylabel("memory per rank, mean (GiB)")
    axes.grid(alpha=0.3)
    _legend(axes)


def _legend(axes: Any) -> None:
    """Below the axes, where no curve is."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize="small", frameon=False)
