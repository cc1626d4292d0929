"""All that the result of a run of ``bench field`` depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Training:
    """What a run is trained on, and how: the same for all contenders of a table.

    Attributes:
        model: a preset's name.
        dataset: as in launch/pretrain.py.
        batch: sequences of a step, each of ``seq_len`` tokens.
        warmup: steps of rising lr; then it falls by a cosine to a tenth.
        precision: of forward and backward; ``"bf16"`` is by autocast. Weights are fp32.
    """

    model: str = "llama-tiny"
    dataset: str = "builtin"
    batch: int = 8
    seq_len: int = 128
    warmup: int = 40
    precision: str = "fp32"


@dataclass(frozen=True)
class Setting(Training):
    """One run.

    Attributes:
        contender: its name, see :func:`lorapre_dist.bench.field.registry.contender`.
        lr: of the matrices, the highest of the schedule.
        seed: of the first weights and the order of the data.
        steps: optimizer steps.
        points: at how many of them, evenly spread, the held-out loss is looked at; 0: at the end alone.
    """

    contender: str = ""
    lr: float = 0.0
    seed: int = 0
    steps: int = 0
    points: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Setting:
        """The setting that a record begins with."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    @property
    def training(self) -> Training:
        """What it shares with other contenders' runs."""
        return Training(**{field.name: getattr(self, field.name) for field in fields(Training)})

    def as_record(self) -> dict[str, Any]:
        """How a record begins."""
        return asdict(self)
