"""Tables of results, from what was measured (``docs/results/data``): one row a measurement, figures as printed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lorapre_dist.bench import weights
from lorapre_dist.bench.field import report
from lorapre_dist.bench.field.plan import Protocol
from lorapre_dist.bench.field.registry import CONTENDERS
from lorapre_dist.bench.field.store import Store
from lorapre_dist.bench.training import Training

DATA = Path(__file__).resolve().parents[1] / "results" / "data"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The measurements in ``data/NAME.csv``."""
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(name: str) -> str:
    """A file as it is."""
    rows = read(name)
    return table(list(rows[0]), [list(row.values()) for row in rows])


def pivot(rows: list[Row], index: Sequence[str], column: str, value: str, label: str = "{}") -> str:
    """A line for each combination of ``index``, a column for each value of ``column``; "-" where there is nothing."""
    columns = list(dict.fromkeys(row[column] for row in rows))
    if all(name.isdigit() for name in columns):
        columns.sort(key=int)
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in index), {})[row[column]] = row[value]
    body = [[*key, *(cells.get(c, "-") for c in columns)] for key, cells in lines.items()]
    return table([*index, *map(label.format, columns)], body)


def equality(layouts: Callable[[str], bool], index: Sequence[str]) -> str:
    """Distance of LoRAPre to the dense reference by number of ranks."""
    rows = [row for row in read("equality") if row["optimizer"] == "LoRAPre" and layouts(row["layout"])]
    return pivot(rows, index, "ranks", "error", "N = {}")


def equality_of_others() -> str:
    """The largest distance of each other optimizer over all numbers of ranks."""
    rows = [row for row in read("equality") if row["optimizer"] != "LoRAPre"]
    return pivot(rows, ["layout", "precision"], "optimizer", "error")


def quality(compared_with: str) -> str:
    """Validation loss by learning rate, the best of each row, and its distance to that of the first row."""
    rows = [row for row in read("quality") if row["compared_with"] == compared_with]
    body: list[list[str]] = []
    baseline = None
    for name, rank in dict.fromkeys((row["optimizer"], row["rank"]) for row in rows):
        own = [row for row in rows if (row["optimizer"], row["rank"]) == (name, rank)]
        best = min(own, key=lambda row: float(row["loss"]))
        baseline = baseline or best
        losses = ", ".join(f"{'**' * (row is best)}{row['loss']}{'**' * (row is best)} ({row['lr']})" for row in own)
        apart = "-" if best is baseline else f"{float(best['loss']) - float(baseline['loss']):+.3f}"
        body.append([name, rank or "-", losses, best["loss"], apart])
    return table(
        ["optimizer of the matrices", "rank", "loss (learning rate)", "best", f"minus {compared_with}'s best"], body
    )


def worst_distance(layouts: Callable[[str], bool]) -> str:
    """The largest distance of LoRAPre to the dense reference over such layouts, ranks and precisions."""
    errors = [row["error"] for row in read("equality") if row["optimizer"] == "LoRAPre" and layouts(row["layout"])]
    return max(errors, key=float)


def is_zero(layout: str) -> bool:
    """Whether a layout is one of DeepSpeed's."""
    return layout.startswith("ZeRO")


def is_native(layout: str) -> bool:
    """Whether a layout is one of PyTorch's."""
    return not is_zero(layout) and layout != "core alone"


def fits() -> str:
    """What fits where: a line for each model, a column for each kind and number of cards."""
    rows = [{**row, "cards": f"{row['cards']} x {row['GB a card']} GB"} for row in read("fits")]
    return pivot(rows, ["model"], "cards", "options")


#: How the recorded runs of ``bench field`` were made: the command's defaults.
FIELD = Protocol(Training(), steps=1000, screen_steps=300, seeds=(0, 1, 2))


#: The texts on which runs were recorded, and what ``--dataset`` was.
TEXTS = {"built-in": FIELD.training.dataset, "code": "code.jsonl", "prose": "prose.jsonl"}

#: And those with a model of 60M parameters, on a GPU.
FIELD_60M = replace(
    FIELD,
    training=Training("llama-60m", "packages", batch=32, seq_len=256, warmup=100, precision="bf16"),
    screen_steps=200,
    seeds=(0,),
)


def field_60m(table: Callable[[list[report.Row]], str]) -> str:
    """A table of these runs."""
    return table(report.rows(Store(DATA / "field_60m.jsonl"), FIELD_60M))


def field_runs() -> Store:
    """The recorded runs of ``bench field``."""
    return Store(DATA / "field.jsonl")


def field(table: Callable[[list[report.Row]], str]) -> str:
    """A table of the recorded runs of ``bench field``, all contenders in their order."""
    return table(report.rows(field_runs(), FIELD))


BESIDE = ["adamw", "lorapre-8", "lorapre-32"]


def beside_adamw(steps: int) -> str:
    """The README's table: LoRAPre's validation loss and state beside AdamW's, of the recorded runs of so many steps."""
    columns = ["optimizer of the matrices", "rank", "of AdamW's", "validation loss", "seeds", "minus AdamW"]
    head = ["state" if name == "of AdamW's" else name for name in columns]
    return table(head, _beside(replace(FIELD, steps=steps), columns))


def on_texts() -> str:
    """The same on every text, for each number of steps that has been recorded there."""
    columns = ["optimizer of the matrices", "rank", "lr", "validation loss", "seeds", "minus AdamW"]
    lines = []
    for steps in (1000, 4000):
        for text, dataset in TEXTS.items():
            protocol = replace(FIELD, training=replace(FIELD.training, dataset=dataset), steps=steps)
            lines += [[f"{steps:,}", text, *line] for line in _beside(protocol, columns)]
    return table(["steps", "text", *columns], lines)


def _beside(protocol: Protocol, columns: list[str]) -> list[list[str]]:
    """Columns of the table of long runs, of LoRAPre at both ranks and AdamW."""
    found = report.rows(field_runs(), protocol, BESIDE)
    lines = [dict(zip(report.HEAD, report.cells(row, found[0]), strict=True)) for row in found if row.finals]
    return [[line[name] for name in columns] for line in lines]


def contenders() -> str:
    """Every contender, where it comes from, and the learning rates that it begins with."""
    rows = [
        [f"`{name}`", known.label, known.package or known.origin, ", ".join(f"{lr:g}" for lr in known.lrs)]
        for name, known in CONTENDERS.items()
    ]
    return table(["`--rows`", "optimizer of the matrices", "from", "learning rates"], rows)


def fewer_bits() -> str:
    """The recorded runs of ``bench weights``."""
    losses: weights.Losses = {}
    for row in read("weights"):
        losses.setdefault(row["row"], {})[int(row["seed"])] = float(row["loss"])
    return weights.table(losses, sorted({seed for of in losses.values() for seed in of}))


TABLES: dict[str, Callable[[], str]] = {
    "equality_deepspeed": lambda: equality(is_zero, ["layout", "precision"]),
    "equality_native": lambda: equality(is_native, ["layout"]),
    "equality_core": lambda: equality(lambda layout: layout == "core alone", ["layout", "precision"]),
    "equality_others": equality_of_others,
    "equality_axes": lambda: plain("equality_axes"),
    "many_ranks": lambda: plain("many_ranks"),
    "resume": lambda: pivot(read("resume"), ["layout"], "ranks", "error", "N = {}"),
    "quality_adamw": lambda: quality("AdamW"),
    "quality_muon": lambda: quality("Muon"),
    "gauges": lambda: plain("gauges"),
    "five_thousand_steps": lambda: pivot(read("five_thousand_steps"), ["run"], "step", "loss"),
    "conditions": lambda: pivot(read("conditions"), ["quantity"], "step", "largest"),
    "soak": lambda: pivot(read("soak"), ["gradients"], "optimizer", "error"),
    "field_compared": lambda: field(report.compared),
    "field_4000": lambda: report.compared(report.rows(field_runs(), replace(FIELD, steps=4000))),
    "field_60m": lambda: field_60m(report.compared),
    "field_60m_searched": lambda: field_60m(report.searched),
    "field_texts": on_texts,
    "field_costs": lambda: report.costs(field_runs(), FIELD.training),
    "field_searched": lambda: field(report.searched),
    "field_missing": lambda: field(lambda rows: report.lacking(rows, FIELD)),
    "field_betas": lambda: report.varied(field_runs(), FIELD, "adamw"),
    "field_varied": lambda: report.varied(field_runs(), FIELD, "lorapre-8"),
    "field_exchanged": lambda: report.varied(field_runs(), FIELD, "lorapre-8", "lorapre-dense-8"),
    "field_varied_32": lambda: report.varied(field_runs(), FIELD, "lorapre-32"),
    "field_varied_muon_8": lambda: report.varied(field_runs(), FIELD, "lorapre-muon-8"),
    "field_varied_muon_32": lambda: report.varied(field_runs(), FIELD, "lorapre-muon-32"),
    "field_varied_muon": lambda: report.varied(field_runs(), FIELD, "muon"),
    "field_contenders": contenders,
    "tracking": lambda: plain("tracking"),
    "large_elements": lambda: plain("large_elements"),
    "weights": fewer_bits,
    "finetune": lambda: plain("finetune"),
    "fits": fits,
    "training_memory": lambda: plain("training_memory"),
    "scaling": lambda: plain("scaling"),
}


def write(out: Path) -> None:
    """One Markdown file for every table."""
    out.mkdir(parents=True, exist_ok=True)
    for name, made in TABLES.items():
        (out / f"{name}.md").write_text(made() + "\n", encoding="utf-8")
