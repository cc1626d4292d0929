"""What a checkpoint says about its tensors.

``checkpoint.json`` in a checkpoint, with an entry for each tensor (``entries.py``):

    {"format": 2, "layout": "ZeRO-2", "world_size": 4, "step": 1000, "frozen": "saved",
     "aliases": {NAME: NAME of the tensor it is tied to},
     "parameters": {NAME: {"kind": "lorapre", ...} | {"kind": "adamw", ...} | {"kind": "untrained", ...}},
     "param_groups": [{"lr": ..., "rank": ..., ...}]}

Format 1 had factors of any size, perhaps not finite, and mean squares, ``v_row`` and ``v_col``, for their roots. It can
be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.factors import Matrix
from ..core.rounding import COMPENSATION
from ..optimizers.base import LowRankOptimizer
from ..state.state_dict import plain_groups
from . import entries, files, folder
from .entries import Entry, LowRank, Trained
from .files import CheckpointError

FILE = folder.DESCRIPTION
FORMAT = 2
TENSORS = "tensors"


@dataclass(frozen=True, kw_only=True)
class Content:
    """A checkpoint's ``checkpoint.json``.

    Attributes:
        format: in which the tensors are.
        layout, world_size, step: of the run that saved it.
        aliases: names of tied tensors, with that under which the tensor was saved.
        frozen: ``saved``, or ``excluded`` where frozen parameters were left out.
        parameters: every tensor of it by name.
        param_groups: options of the optimizer's groups.
    """

    format: int = FORMAT
    layout: str
    world_size: int
    step: int
    aliases: Mapping[str, str]
    frozen: str
    parameters: Mapping[str, Entry]
    param_groups: list[dict[str, Any]]

    @property
    def trained(self) -> dict[str, Trained]:
        """What was trained."""
        return {name: entry for name, entry in self.parameters.items() if isinstance(entry, Trained)}

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """What has factors."""
        return {name: entry for name, entry in self.parameters.items() if isinstance(entry, LowRank)}

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        parameters = {name: entry.to_json() for name, entry in self.parameters.items()}
        return vars(self) | {"aliases": dict(self.aliases), "parameters": parameters}

    def write(self, path: Path) -> None:
        """Into a checkpoint."""
        folder.write_json(path / FILE, self.to_json())


def parameters(optimizer: LowRankOptimizer) -> dict[str, Trained]:
    """What this rank's optimizer holds, by parameter name."""
    found: dict[str, Trained] = {}
    for bound in optimizer.bound():
        state, shape = bound.state, tuple(bound.piece.shape)
        compensated = COMPENSATION in state.rounding.tensors()
        if isinstance(state, Matrix):
            found[bound.piece.name] = LowRank(
                shape=shape,
                step=state.step,
                compensated=compensated,
                optimizer=state.optimizer,
                variant=state.variant,
                ranks=state.ranks,
                vectors=tuple(state.vectors),
                forms={moment: form for moment, form in state.forms.items() if form != "fp32"},
            )
        else:
            found[bound.piece.name] = Trained(shape=shape, step=state.step, compensated=compensated)
    return found


def describe(
    optimizer: LowRankOptimizer,
    held: list[dict[str, Trained]],
    untrained: Mapping[str, tuple[int, ...]],
    *,
    step: int,
    aliases: Mapping[str, str],
    frozen: str,
) -> Content:
    """What a checkpoint of the optimizer says.

    Args:
        held: :func:`parameters` of every rank.
        untrained: shapes of the tensors beside them.
    """
    assert optimizer.layout is not None
    trained = {name: entry for part in held for name, entry in part.items()}
    return Content(
        layout=optimizer.layout.name,
        world_size=len(held),
        step=step,
        aliases=aliases,
        frozen=frozen,
        parameters=trained | {name: Entry(shape=tuple(shape)) for name, shape in untrained.items()},
        param_groups=plain_groups(optimizer.param_groups),
    )


def read(path: Path) -> Content:
    """``checkpoint.json`` of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    try:
        content = files.read_object(path / FILE)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path} has no {FILE}: it is not whole, or no optimizer of lorapre_dist has written it"
        ) from None
    except (CheckpointError, OSError) as error:
        reason = str(error).removeprefix(f"{path / FILE} ")
        raise CheckpointError(f"checkpoint {path}: {FILE} {reason}") from error
    if "parameters" not in content:
        raise CheckpointError(f"checkpoint {path}: {FILE} does not describe one")
    if content.get("format") not in (1, FORMAT):
        raise CheckpointError(
            f"checkpoint {path} holds tensors in format {content.get('format')!r:.80}; this version reads 1 "
            f"and {FORMAT}"
        )
    content = {"aliases": {}, "frozen": "saved"} | content
    if problem := next(_wrong(content), None):
        raise CheckpointError(f"checkpoint {path}: {FILE} {problem}")
    parameters = {}
    for name, entry in content["parameters"].items():
        try:
            parameters[name] = entries.read(entry)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path}: {FILE} says of {name!r:.200} {error}") from error
    known = {key: content[key] for key in Content.__dataclass_fields__}
    return Content(**known | {"parameters": parameters})


def _wrong(content: dict[str, Any]) -> Iterator[str]:
    """What is not of the form at the top of this module, the entries apart, in words."""
    for key in ("step", "world_size"):
        if not files.is_count(content.get(key)):
            yield f"says {key} {content.get(key)!r:.80}, which is no whole number"
    if not (isinstance(content.get("layout"), str) and isinstance(content["frozen"], str)):
        yield "says a layout, or what became of frozen parameters, that is no text"
    aliases = content["aliases"]
    if not (isinstance(aliases, dict) and all(isinstance(name, str) for name in aliases.values())):
        yield "has aliases that are not names"
    groups = content.get("param_groups")
    if not (isinstance(groups, list) and all(isinstance(group, dict) for group in groups)):
        yield "has no list of parameter groups"
    if not isinstance(content["parameters"], dict):
        yield "has no parameters by name"
