"""Whether the ranks that train together have built the same; compared before anything whose shape depends on it.

A rank with another lr, seed or order of parameters would train something else without a word, and one with another rank
or group would end in the middle of a collective. So what each of them has built is written down, fact by fact, and a
digest of it is gathered, of a few bytes for each rank. Only where digests differ are the facts gathered as well, and
then all ranks raise the same line.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config.checks import ConfigError, shown
from ..core.comm import Comm, all_ranks
from .tensors import may_step

#: What a rank has built: what it is about, in words, and the value, in words; the most telling first.
Facts = dict[str, str]

_DIGEST = 32
_MOST = 4


def require(facts: Facts, group: Any = None, shares: Iterable[int] | None = None) -> None:
    """Raise unless all ranks that share parameters have the same facts; a collective over ``group`` (None: the world).

    Args:
        shares: ranks of ``group`` with which this one shares parameters; None: all. Stages of a pipeline share none,
            and may differ.

    Raises:
        ConfigError: one and the same line on every rank of ``group``: what differs, on which ranks, and the values.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    size = dist.get_world_size(group)
    row = torch.zeros(_DIGEST + size, dtype=torch.uint8)
    row[:_DIGEST] = torch.tensor(list(_digest(facts)), dtype=torch.uint8)
    row[_DIGEST:][list(range(size) if shares is None else shares)] = 1
    rows = Comm().all_gather(row, group, "agreement")().cpu()  # no part of a step
    digests = [tuple(line) for line in rows[:, :_DIGEST].tolist()]
    apart = [team for team in _teams(rows[:, _DIGEST:] > 0) if len({digests[k] for k in team}) > 1]
    if apart:
        everyone, ranks = all_ranks(facts, group), dist.get_process_group_ranks(group or dist.group.WORLD)
        raise ConfigError(_disagreement({ranks[k]: everyone[k] for k in apart[0]}))


def of_optimizer(optimizer: Any, shapes: Mapping[str, tuple[int, ...]]) -> Facts:
    """The facts about one of our optimizers and its parameters.

    Args:
        shapes: of whole parameters by name, where a tensor does not tell its own.
    """
    return of_settings(optimizer) | of_parameters(optimizer._named(), shapes)


def of_settings(optimizer: Any) -> Facts:
    """Class, versions, and every setting of every parameter group."""
    facts = {**of_program(optimizer.config.optimizer), "shard_state": str(optimizer.shard_state)}
    facts["the number of parameter groups"] = str(len(optimizer.param_groups))
    for i, group in enumerate(optimizer.param_groups):
        facts |= {f"{k} of parameter group {i}": shown(v) for k, v in asdict(optimizer.group_config(group)).items()}
    return facts


def of_program(optimizer: str) -> Facts:
    """The optimizer's name, and the versions of what it runs on."""
    ours = sys.modules[__package__ or ""]
    return {
        "the optimizer": optimizer,
        "the version of lorapre_dist": str(getattr(ours, "__version__", "")),
        "the version of torch": torch.__version__,
    }


def of_parameters(
    named: Iterable[tuple[str, Tensor, int | None]], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Facts:
    """Shape, type, placement and group (if known) of each parameter, whether it is trained, and their order."""
    named, shapes = list(named), shapes or {}
    facts = {}
    for name, p, group in named:
        shape = tuple(shapes.get(name, getattr(p, "ds_shape", p.shape)))
        placed = f", {p.placements} of {tuple(p.device_mesh.shape)}" if isinstance(p, DTensor) else ""
        trained = "trained" if may_step(p) else "frozen"
        kind = str(p.dtype).removeprefix("torch.")
        facts[f"parameter {name!r}"] = f"{shape} {kind}{placed}, {trained}" + f", in group {group}" * (
            group is not None
        )
    return facts | {f"parameter number {k}": repr(name) for k, (name, _, _) in enumerate(named)}


def _digest(facts: Facts) -> bytes:
    return hashlib.blake2b(repr(list(facts.items())).encode(), digest_size=_DIGEST).digest()


def _teams(shares: Tensor) -> list[list[int]]:
    """Ranks that share parameters, directly or through others, from who says to share with whom (ranks x ranks)."""
    linked = shares | shares.T
    linked.fill_diagonal_(True)
    size = len(linked)
    label, before = torch.arange(size), torch.empty(0)
    while not torch.equal(label, before):
        before, label = label, torch.where(linked, label, size).amin(1)
    return [(label == first).nonzero().view(-1).tolist() for first in label.unique().tolist()]


def _disagreement(everyone: dict[int, Facts]) -> str:
    """The first fact that differs, in one line; ``everyone`` has the facts of each rank."""
    found = []
    for key in dict.fromkeys(key for facts in everyone.values() for key in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in everyone.items():
            ranks.setdefault(facts.get(key, "missing"), []).append(rank)
        if len(ranks) > 1:
            values = [f"{value} on {_ranks(some)}" for value, some in ranks.items()]
            more = f"; and {len(values) - _MOST} other values" if len(values) > _MOST else ""
            found.append(f"{key}: {'; '.join(values[:_MOST])}{more}")
    more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
    return f"the ranks do not agree on {found[0]}{more}; build the same model and optimizer on every rank"


def _ranks(ranks: list[int]) -> str:
    """Ranks in words, runs of them as such."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
