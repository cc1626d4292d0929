"""``metrics.jsonl``, TensorBoard and Weights & Biases, written by rank 0."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lorapre_dist.checkpoint.folder import write_atomically
from lorapre_dist.training.run.settings import RunSettings, describe

METRICS_FILE = "metrics.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file in order; a last row that a killed run left half-written is dropped."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite the file with the rows up to ``step`` only, so that no step is there twice; returns them."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


class MetricsWriter:
    """Appends rows to every sink; ``resumed_step`` is the step that the run continues from."""

    def __init__(self, settings: RunSettings, resumed_step: int) -> None:
        folder = Path(settings.output_dir)
        self.rows = keep_until(folder / METRICS_FILE, resumed_step if resumed_step else -1)
        self.file = open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115  (held open over the run)
        self.board: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
        self.wandb = _start_wandb(settings) if settings.wandb else None

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, visible to readers at once; JSON knows no infinity, which becomes null."""
        row = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in row.items() if name != "step" and value is not None}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Flush and close every sink."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(settings: RunSettings) -> Any:
    import wandb

    name = settings.run_name or Path(settings.output_dir).name
    return wandb.init(
        project=settings.wandb_project,
        name=name,
        id=name.replace("/", "-"),
        resume="allow",
        dir=settings.output_dir,
        config=describe(settings),
    )
