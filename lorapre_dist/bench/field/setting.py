"""All that the result of a run of ``bench field`` depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lorapre_dist.bench.training import Training


@dataclass(frozen=True)
class Setting(Training):
    """One run.

    Attributes:
        contender: its name, see :func:`lorapre_dist.bench.field.registry.contender`.
        lr: of the matrices, the highest of the schedule.
        seed: of the first weights and the order of the data.
        steps: optimizer steps.
        points: at how many of them, evenly spread, the held-out loss is looked at; 0: at the end alone.
        point_sequences: held-out sequences that such a loss is of; 0: all, as at the end.
    """

    contender: str = ""
    lr: float = 0.0
    seed: int = 0
    steps: int = 0
    points: int = 0
    point_sequences: int = 64

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Setting:
        """The setting that a record begins with; what it does not say has its default.

        Raises:
            KeyError: it does not say which contender.
        """
        return cls(
            **{"contender": record["contender"]} | {f.name: record[f.name] for f in fields(cls) if f.name in record}
        )

    @property
    def training(self) -> Training:
        """What it shares with other contenders' runs."""
        return Training(**{field.name: getattr(self, field.name) for field in fields(Training)})

    def as_record(self) -> dict[str, Any]:
        """How a record begins."""
        return asdict(self)
