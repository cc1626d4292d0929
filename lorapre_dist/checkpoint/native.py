"""Checkpoints without DeepSpeed: FSDP2, FSDP1, DDP or one device, in the same form, so they resume under each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ..config.param_groups import clean_name
from ..optimizers.base import LowRankOptimizer
from . import folder, loading, model, run
from .files import CheckpointError
from .team import Team


def save(
    module: torch.nn.Module,
    optimizer: LowRankOptimizer,
    directory: str | Path,
    tag: str,
    *,
    step: int | None = None,
    lr_scheduler: Any = None,
    extra: dict[str, Any] | None = None,
    keep_last: int | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write the weights of ``module``, the optimizer's state and ``extra`` as ``directory/tag``; a collective.

    Args:
        step: of the run; default: the number of optimizer steps taken.
        lr_scheduler: to save as well.
        extra: tensors and plain values in lists and dicts (data position, ...); rank 0's counts.
        keep_last: delete all but this many of the newest complete checkpoints.
        also: called on every rank with the folder, before it is published, to add files of one's own.

    Raises:
        CheckpointError: on every rank, if one could not write; training can go on.
    """
    made = job(module, optimizer, step=step, lr_scheduler=lr_scheduler, extra=extra, also=also)
    return run.save(made, directory, tag, keep_last=keep_last)


def job(
    module: torch.nn.Module,
    optimizer: LowRankOptimizer,
    *,
    step: int | None = None,
    lr_scheduler: Any = None,
    extra: dict[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
) -> run.Job:
    """What :func:`save` saves, for :mod:`lorapre_dist.checkpoint.run`; a collective."""
    if step is None:
        steps = [bound.state.step for bound in optimizer.bound()]
        step = max(max(part, default=0) for part in Team().gather(steps))
    _reshard(module)
    rest = model.untrained(module, _trained(module, optimizer))
    schedule = lr_scheduler.state_dict() if lr_scheduler is not None else None
    state: dict[str, Any] = {
        "global_steps": step,
        "skipped_steps": optimizer.skipped_steps,
        "lr_scheduler": schedule,
        "loss_scaler": {},
    }
    content = {"engine": state, "client_state": extra or {}}
    return run.Job(optimizer, step, rest, model.aliases(module), content, also=also)


def load(
    module: torch.nn.Module,
    optimizer: LowRankOptimizer,
    directory: str | Path,
    tag: str | None = None,
    *,
    lr_scheduler: Any = None,
    states: bool = True,
    resize_rank: bool = False,
    verify: bool = True,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Load what :func:`save` or a DeepSpeed engine with LoRAPre wrote, under any layout; a collective.

    Args:
        tag: which; default: what ``latest`` names.
        lr_scheduler: to restore as well.
        states: False to load weights alone.
        resize_rank: adapt factors of another rank.
        verify: False if the files have been read through already (:func:`lorapre_dist.checkpoint.verify`).
        check: called with ``extra`` before anything is loaded; what it raises ends the load.

    Returns:
        ``extra`` (the client state of a DeepSpeed engine); None if ``directory`` holds no checkpoint.

    Raises:
        CheckpointError: damaged, or it does not fit; nothing has been loaded then.
    """
    directory, team = Path(directory), Team()
    chosen = team.gather(None if team.rank else folder.choose(directory, tag))[0]
    if isinstance(chosen, str):
        raise CheckpointError(chosen)
    if not chosen:
        return None
    optimizer.bound()  # finds the layout
    _reshard(module)
    found = loading.load(
        directory / chosen[0],
        optimizer,
        untrained=model.untrained(module, _trained(module, optimizer)),
        states=states,
        resize_rank=resize_rank,
        intact=not verify,
        check=functools.partial(run.check_extra, directory / chosen[0], check),
    )
    if lr_scheduler is not None and found["engine"]["lr_scheduler"] is not None:
        lr_scheduler.load_state_dict(found["engine"]["lr_scheduler"])
    if states:
        optimizer.skips.restart(found["engine"].get("skipped_steps", 0))
    client_state: dict[str, Any] = found["client_state"]
    return client_state


def _reshard(module: torch.nn.Module) -> None:
    """Show FSDP2's parameters in shards; after an evaluation those of the outermost unit are whole."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _trained(module: torch.nn.Module, optimizer: LowRankOptimizer) -> set[str]:
    """Names of the parameters that are stepped, also where this rank holds nothing of one."""
    optimizer.bound()
    assert optimizer.layout is not None
    stepped = {id(unit.tensor) for unit in optimizer.layout.units}
    return {clean_name(name) for name, p in module.named_parameters(remove_duplicate=False) if id(p) in stepped}
