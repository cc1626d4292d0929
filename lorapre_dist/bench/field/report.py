"""Tables and figures of the runs that are there; what is printed is rounded here, once."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorapre_dist.bench.training import Training, nats, signed

from .contender import Contender
from .plan import Protocol, Search, search
from .registry import CONTENDERS, contender
from .store import Record, Store

BASELINE = "adamw"


@dataclass
class Row:
    """What is known of a contender under one protocol.

    Attributes:
        name: of the contender.
        label: what it is called in a table.
        package: where it comes from.
        found: of the search for its learning rate.
        error: why it cannot run, where it cannot.
        finals: records of the long runs by seed, all with the same learning rate.
    """

    name: str
    label: str
    package: str
    found: Search
    error: str | None
    finals: dict[int, Record] = field(default_factory=dict)

    @property
    def record(self) -> Record:
        """A long run's, with what is the same in all of them."""
        return next(iter(self.finals.values()))

    @property
    def losses(self) -> dict[int, float]:
        """Losses at the end by seed; infinite where it diverged."""
        return {seed: math.inf if r["val_loss"] is None else r["val_loss"] for seed, r in sorted(self.finals.items())}

    def behind(self, other: Row) -> list[float]:
        """By seed, the loss minus that of the ``other`` row, as far as both have been run."""
        theirs = other.losses
        return [loss - theirs[seed] for seed, loss in self.losses.items() if seed in theirs]

    def steps_to(self, other: Row) -> float | None:
        """Steps after which its curve is at the last point of the ``other`` row's; the mean over seeds, None: never."""
        reached = []
        for seed, record in self.finals.items():
            if seed in other.finals and other.finals[seed]["curve"]:
                goal = list(other.finals[seed]["curve"].values())[-1]
                reached.append(crossing(record["curve"], goal))
        known = [step for step in reached if step is not None]
        return statistics.mean(known) if known and len(known) == len(reached) else None


def crossing(curve: dict[str, float | None], goal: float | None) -> float | None:
    """The first step at which a curve, taken as straight between its points, is at ``goal`` or below."""
    before: tuple[float, float] | None = None
    for step, loss in ((int(step), loss) for step, loss in curve.items()):
        if loss is None or goal is None:
            return None
        if loss <= goal:
            if before is None or before[1] == loss:
                return step
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = step, loss
    return None


def rows(store: Store, protocol: Protocol, names: Iterable[str] = CONTENDERS) -> list[Row]:
    """A row for each of the ``names``, in their order."""
    return [_row(name, contender(name), store, protocol) for name in names]


def _row(name: str, known: Contender, store: Store, protocol: Protocol) -> Row:
    found = search(name, known.lrs, protocol, store.get)
    row = Row(name, known.label, known.package or known.origin, found, found.error or known.cannot or None)
    lr = found.best
    if lr is None:
        # The search is not over: long runs there are of a learning rate that was given.
        long = [s.lr for s in store.records if s == protocol.final(name, s.lr, s.seed)]
        lr = max(sorted(set(long)), key=long.count, default=None)
    if lr is not None:
        runs = {seed: store.get(protocol.final(name, lr, seed)) for seed in protocol.seeds}
        row.finals = {seed: record for seed, record in runs.items() if record and "error" not in record}
        failed = next((record["error"] for record in runs.values() if record and "error" in record), None)
        row.error = row.error or failed
    return row


# tables ---------------------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


HEAD = (
    "optimizer of the matrices",
    "rank",
    "from",
    "lr",
    "validation loss",
    "seeds",
    "minus AdamW",
    "steps to AdamW's loss",
    "state",
    "of AdamW's",
    "peak of a step",
    "ms of a step",
)


def compared(found: list[Row]) -> str:
    """The table of the long runs, best first: Markdown."""
    done = sorted((row for row in found if row.finals), key=lambda row: statistics.mean(row.losses.values()))
    base = next((row for row in done if row.name == BASELINE), None)
    return markdown(HEAD, [[str(cell) for cell in cells(row, base)] for row in done])


def cells(row: Row, base: Row | None) -> list[str]:
    """A line of :func:`compared`."""
    record, losses = row.record, list(row.losses.values())
    behind = row.behind(base) if base and row is not base else []
    reached = row.steps_to(base) if base and row is not base else None
    return [
        row.label,
        str(record["rank"] or "-"),
        row.package,
        f"{record['lr']:g}"
        + ("" if row.found.inside else " (given)" if row.found.best != record["lr"] else " (an end)"),
        nats(statistics.mean(losses)) + spread(losses),
        str(len(losses)),
        signed(statistics.mean(behind)) + spread(behind) if behind else "-",
        f"{reached:.0f}" if reached is not None else "-",
        kib(record["state_bytes"]),
        f"{100 * record['state_bytes'] / base.record['state_bytes']:.1f}%" if base else "-",
        kib(record["peak_bytes"]),
        f"{statistics.mean(r['step_ms'] for r in row.finals.values()):.1f}",
    ]


def costs(store: Store, training: Training, names: Iterable[str] = CONTENDERS) -> str:
    """The table of what each contender holds and takes, of its longest run, by bytes of state: Markdown."""
    longest: dict[str, Record] = {}
    for setting, record in store.records.items():
        if replace(setting.training, warmup=training.warmup) == training and "error" not in record:
            longest[setting.contender] = max(longest.get(setting.contender, record), record, key=lambda r: r["steps"])
    shown = sorted((name for name in names if name in longest), key=lambda name: longest[name]["state_bytes"])
    base, lines = longest.get(BASELINE), []
    for name in shown:
        record, known = longest[name], contender(name)
        part = f"{100 * record['state_bytes'] / base['state_bytes']:.1f}%" if base else "-"
        sizes = [kib(record["state_bytes"]), part, kib(record["kept_bytes"]), kib(record["peak_bytes"])]
        lines.append([titled_of(known), known.package or known.origin, *sizes, f"{record['step_ms']:.1f}"])
    heads = ["optimizer of the matrices", "from", "state", "of AdamW's", "kept", "peak of a step", "ms of a step"]
    return markdown(heads, lines)


def searched(found: list[Row]) -> str:
    """The table of the short runs that look for the learning rate, by the best of them: Markdown."""
    tried = [row for row in found if row.found.losses]
    lowest = {row.name: min(row.found.losses.values()) for row in tried}
    base = lowest.get(BASELINE)
    lines = []
    for row in sorted(tried, key=lambda row: lowest[row.name]):
        best = lowest[row.name]
        shown = (
            f"**{nats(x)}** ({lr:g})" if x == best else f"{nats(x)} ({lr:g})" for lr, x in row.found.losses.items()
        )
        state = "yes" if row.found.inside else "not yet" if row.found.wanted else "no"
        away = signed(best - base) if base is not None and row.name != BASELINE else "-"
        lines.append([titled(row), ", ".join(shown), nats(best), away, state])
    return markdown(
        ["optimizer of the matrices", "loss (learning rate)", "best", "minus AdamW's best", "best is inside"], lines
    )


def titled(row: Row) -> str:
    """As :func:`titled_of`, of a row."""
    return titled_of(contender(row.name))


def titled_of(known: Contender) -> str:
    """The label with the part of the hidden size that the rank is, where there is one."""
    return f"{known.label}, hidden/{known.share}" if known.share else known.label


def lacking(found: list[Row], protocol: Protocol) -> str:
    """The table of what is missing, and why; "" where nothing is: Markdown."""
    lines = []
    for row in found:
        tried, wanted, seeds = len(row.found.losses), len(row.found.wanted), len(row.finals)
        why = []
        if row.error:
            why = [f"cannot run: {row.error}"]
        elif not row.found.wanted and row.found.losses and row.found.best is None:
            why = ["diverged at every learning rate"]
        else:
            why += [f"{tried} learning rates tried, {wanted} to try"] if wanted else []
            why += [f"{seeds} of {len(protocol.seeds)} seeds"] if seeds < len(protocol.seeds) else []
        if why:
            lines.append([titled(row), row.package, "; ".join(why)])
    return markdown(["optimizer of the matrices", "from", "missing"], lines) if lines else ""


def varied(store: Store, protocol: Protocol, name: str, of: str | None = None) -> str:
    """The table of long runs with other options, against the contender ``name`` itself and AdamW: Markdown.

    Args:
        of: the contender that has been given options, if it is another form of that.
    """
    names = dict.fromkeys(s.contender for s in store.records if s.contender.startswith(f"{of or name}+"))
    plain, adamw, *others = rows(store, protocol, [name, BASELINE, *names])
    bases = [plain] if name == BASELINE else [plain, adamw]
    lines = []
    for row in [plain, *others]:
        if row.finals:
            away = [row.behind(base) if row is not base else [] for base in bases]
            means = [signed(statistics.mean(x)) + spread(x) if x else "-" for x in away]
            lr, losses = row.record["lr"], list(row.losses.values())
            options = ", ".join(row.name.split("+")[1:]) or "as it is"
            lines.append([options, f"{lr:g}", nats(statistics.mean(losses)) + spread(losses), str(len(losses)), *means])
    heads = ["options", "lr", "validation loss", "seeds", f"minus {plain.label} as it is", "minus AdamW"]
    return markdown(heads[: 4 + len(bases)], lines)


def as_csv(found: list[Row]) -> str:
    """Every long run with its figures, one a line."""
    names = [
        "contender",
        "rank",
        "lr",
        "seed",
        "val_loss",
        "state_bytes",
        "kept_bytes",
        "peak_bytes",
        "step_ms",
        "seconds",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record for row in found for record in row.finals.values())
    return text.getvalue()


def about(training: Training, steps: int) -> str:
    """What the runs have in common, in a line."""
    return (
        f"{training.model}, {training.dataset} text, {steps} steps of {training.batch} x {training.seq_len} tokens, "
        f"{training.warmup} of them of rising learning rate, {training.precision}"
    )


def page(found: list[Row], protocol: Protocol) -> str:
    """All tables as one Markdown file."""
    parts = [f"# {about(protocol.training, protocol.steps)}", compared(found)]
    if any(row.found.losses for row in found):
        parts += [f"## Learning rates, {protocol.screen_steps} steps, seed {protocol.seeds[0]}", searched(found)]
    rest = lacking(found, protocol)
    parts += ["## Missing", rest] if rest else []
    return "\n\n".join(parts) + "\n"


def spread(values: list[float]) -> str:
    """Half the distance of the extremes, where there is more than one value."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return ""
    return f" ± {(max(values) - min(values)) / 2:.3f}"


def kib(size: int) -> str:
    """Bytes as KiB."""
    return f"{size / 1024:.0f} KiB"


# figures --------------------------------------------------------------------------------------------------------


def figure(found: list[Row]) -> Any:
    """Loss against steps, against bytes of state, and against time: a matplotlib figure."""
    from matplotlib.figure import Figure

    drawn = [row for row in found if row.finals and all(map(math.isfinite, row.losses.values()))]
    canvas = Figure(figsize=(13, 4.2), layout="constrained")
    steps, state, seconds = canvas.subplots(1, 3)
    for i, row in enumerate(drawn):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        curve, record = mean_curve(row), row.record
        steps.plot(list(curve), list(curve.values()), label=titled(row), **style)
        each = statistics.mean(r["seconds"] for r in row.finals.values()) / record["steps"]
        seconds.plot([each * step for step in curve], list(curve.values()), **style)
        mean = statistics.mean(row.losses.values())
        state.scatter([record["state_bytes"] / 1024], [mean], color=style["color"])
        state.annotate(titled(row), (record["state_bytes"] / 1024, mean), fontsize=5)
    last = [losses for row in drawn if (losses := list(mean_curve(row).values()))]
    for axes in (steps, seconds):
        if last:
            lowest, highest = min(c[-1] for c in last), max(c[len(c) // 3] for c in last)
            axes.set_ylim(lowest - 0.05, highest)
    steps.set(xlabel="step", ylabel="held-out loss on the way")
    seconds.set(xlabel="CPU seconds, evaluation included")
    state.set(xscale="log", xlabel="KiB of state of the matrices", ylabel="validation loss at the end")
    if drawn:
        steps.legend(fontsize=5, ncols=2)
    return canvas


def mean_curve(row: Row) -> dict[int, float]:
    """The mean of a row's curves over seeds, by step."""
    curves = [record["curve"] for record in row.finals.values()]
    shared = [step for step in curves[0] if all(curve.get(step) is not None for curve in curves)]
    return {int(step): statistics.mean(curve[step] for curve in curves) for step in shared}
