"""``save_checkpoint`` and ``load_checkpoint`` of a DeepSpeed engine that steps with LoRAPre.

DeepSpeed's own partition files hold AdamW's state, fit one world size and stage, and carry pickled objects. Here a tag
holds ours (see :mod:`lorapre_dist.checkpoint.run`) and, beside them, the model-state file that DeepSpeed writes, so
that its ``load_module_only`` goes on working. Loading needs ours alone; where DeepSpeed's are asked for, they are read
without running code. This file imports no DeepSpeed: it works on the attributes of its engine and optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import content, files, folder, loading, model, run
from ...checkpoint.files import CheckpointError
from ...checkpoint.team import Team
from ...optimizers.base import LowRankOptimizer
from ...state.shards import Untrained
from . import names

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def install(engine: Any) -> None:
    """Replace the engine's ``save_checkpoint`` and ``load_checkpoint``; see :func:`save` and :func:`load`."""
    original = engine.load_checkpoint
    engine.save_checkpoint = functools.wraps(engine.save_checkpoint)(functools.partial(save, engine))
    engine.load_checkpoint = functools.wraps(original)(functools.partial(load, engine, original))
    destroy = engine.destroy

    @functools.wraps(destroy)
    def wait_and_destroy(*args: Any, **kwargs: Any) -> Any:
        try:
            wait(engine)
            engine.basic_optimizer.synchronize()
        finally:
            group = engine.__dict__.pop("_lorapre_group", None)
            if group is not None:
                torch.distributed.destroy_process_group(group)
            destroy(*args, **kwargs)

    engine.destroy = wait_and_destroy


def save(
    engine: Any,
    save_dir: str | Path,
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
    *,
    keep_last: int | None = None,
    background: bool = False,
    also: Callable[[Path], None] | None = None,
) -> bool:
    """DeepSpeed's ``save_checkpoint``, all or nothing; a collective.

    Args:
        client_state: tensors and plain values in lists and dicts; rank 0's counts.
        keep_last: delete all but this many of the newest complete checkpoints.
        background: return once the tensors are copied to host memory, and write them while training goes on. The
            next save or load, ``engine.destroy`` and :func:`wait` wait for it and raise what went wrong. DeepSpeed's
            model-state file is left out.
        also: called on every rank with the folder, before it is published, to add files of one's own.

    Raises:
        CheckpointError: on every rank, if one could not write; training can go on.
    """
    if not save_dir:
        raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
    wait(engine)
    tag = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    team = Team()
    tags = sorted(set(team.gather(tag)))
    if len(tags) > 1:
        raise CheckpointError(f"the ranks disagree on the tag of the checkpoint: {tags}")
    with _partitioned(engine):
        job = run.Job(
            engine.basic_optimizer,
            engine.global_steps,
            _untrained(engine, frozen=not exclude_frozen_parameters),
            model.aliases(engine.module, names.naming(engine.module)),
            {"engine": _state(engine), "client_state": client_state or {}},
            "excluded" if exclude_frozen_parameters else "saved",
            functools.partial(_more_files, engine, exclude_frozen_parameters, not background, also),
        )
        if not background:
            run.save(job, save_dir, tag, save_latest=save_latest, keep_last=keep_last)
            return True
        if not hasattr(engine, "_lorapre_group"):
            engine._lorapre_group = run.background_group()
        engine._lorapre_pending = run.save_in_background(
            job, save_dir, tag, group=engine._lorapre_group, save_latest=save_latest, keep_last=keep_last
        )
    return True


def wait(engine: Any) -> None:
    """Wait until a background save of the engine is complete; a collective.

    Raises:
        CheckpointError: it could not be written.
    """
    pending = engine.__dict__.pop("_lorapre_pending", None)
    if pending is not None:
        pending.wait()


def load(
    engine: Any,
    original: Any,
    load_dir: str | Path,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Any = None,
    *,
    resize_rank: bool = False,
    verify: bool = True,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[str | None, dict[str, Any] | None]:
    """DeepSpeed's ``load_checkpoint``, from any ZeRO stage and world size; a collective.

    Args:
        tag: which; default: what ``latest`` names.
        load_module_strict: False leaves frozen parameters and buffers that were not saved as they are, as in the
            adapters of PEFT; what is trained must have been saved all the same.
        load_optimizer_states: False leaves the optimizer as it is.
        load_module_only: weights alone; then a checkpoint of another optimizer is left to DeepSpeed.
        resize_rank: adapt factors that were saved with another ``rank`` or ``rank_v``.
        verify: False if the files have been read through already (:func:`lorapre_dist.checkpoint.verify`).
        check: called with the client state before anything is loaded; what it raises ends the load.

    Returns:
        The checkpoint's folder and the client state; ``(None, None)`` if ``load_dir`` holds none.

    Raises:
        CheckpointError: damaged, not ours, or it does not fit; nothing has been loaded then.
    """
    wait(engine)
    directory, team = Path(load_dir), Team()
    chosen = team.gather(None if team.rank else folder.choose(directory, tag))[0]
    if isinstance(chosen, str):
        raise CheckpointError(chosen)
    if not chosen:
        return None, None
    path = directory / chosen[0]
    foreign = not (path / folder.MANIFEST).is_file() and not (path / content.FILE).is_file()
    if load_module_only and foreign:
        with files.weights_only(path):
            return original(
                load_dir, chosen[0], load_module_strict, load_module_only=True, custom_load_fn=custom_load_fn
            )
    if custom_load_fn is not None:
        raise CheckpointError("custom_load_fn is not supported with LoRAPre")
    states = load_optimizer_states and not load_module_only
    with _partitioned(engine):
        wanted = _untrained(engine)
        saved = content.read(path) if (path / content.FILE).is_file() else None  # else loading.load says what is wrong
        if saved and (not load_module_strict or saved.frozen == "excluded"):
            wanted = {n: t for n, t in wanted.items() if n in saved.parameters}
        extra = loading.load(
            path,
            engine.basic_optimizer,
            untrained=wanted,
            states=states,
            resize_rank=resize_rank,
            intact=not verify,
            check=functools.partial(run.check_extra, path, check),
        )
        _refresh(engine.optimizer, engine.basic_optimizer)
    if not load_module_only:
        _restore(engine, extra["engine"], states, load_lr_scheduler_states)
    return str(path), extra["client_state"]


def _untrained(engine: Any, frozen: bool = True) -> dict[str, Untrained]:
    """What of the model is not stepped."""
    trained = {name for p, name in names.of_parameters(engine).items() if p.requires_grad}
    return model.untrained(engine.module, trained, frozen, names.naming(engine.module))


def _state(engine: Any) -> dict[str, Any]:
    """Counters, lr schedule and loss scale."""
    state: dict[str, Any] = {name: getattr(engine, name) for name in _COUNTERS}
    scheduler = engine.lr_scheduler
    state["lr_scheduler"] = scheduler.state_dict() if scheduler is not None else None
    scaler = _scaler(engine)
    state["loss_scaler"] = {name: getattr(scaler, name) for name in _SCALER if hasattr(scaler, name)}
    return state


def _restore(engine: Any, state: dict[str, Any], states: bool, schedule: bool) -> None:
    samples = state["global_steps"] * engine.train_batch_size()  # unless another engine counted them
    for name in _COUNTERS:
        setattr(engine, name, state.get(name, samples))
    if states:
        engine.basic_optimizer.skips.restart(engine.skipped_steps)
    if schedule and engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if states and engine.dynamic_loss_scale():
        scaler = _scaler(engine)
        for name, value in state["loss_scaler"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def _scaler(engine: Any) -> Any:
    """Where the dynamic loss scale lives; None without fp16."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", engine.optimizer)


def _refresh(wrapper: Any, optimizer: LowRankOptimizer) -> None:
    """Bring the fp32 weights that were loaded to the copies that the model computes with."""
    if wrapper is optimizer:
        return
    if hasattr(wrapper, "fp16_partitioned_groups_flat"):  # ZeRO-3
        for i, masters in enumerate(wrapper.fp32_partitioned_groups_flat):
            if masters.numel():
                wrapper.fp16_partitioned_groups_flat[i].data.copy_(masters.data)
                parts = wrapper.fp16_partitioned_groups[i]
                loaded = wrapper.unflatten(wrapper.fp16_partitioned_groups_flat[i], parts)
                for part, values in zip(parts, loaded, strict=True):
                    part.data = values.data
    elif hasattr(wrapper, "update_lp_params"):  # ZeRO-1, ZeRO-2, BF16
        wrapper.update_lp_params()
    else:  # fp16 under ZeRO-0
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for p, master in zip(low, high, strict=True):
                p.data.copy_(master.data)


@contextmanager
def _partitioned(engine: Any) -> Iterator[None]:
    """Under ZeRO-3, with every parameter in its partitions; those that are kept whole are gathered again afterwards."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "checkpoint_event_prologue"):
        wrapper.checkpoint_event_prologue()
    try:
        yield
    finally:
        if hasattr(wrapper, "checkpoint_event_epilogue"):
            wrapper.checkpoint_event_epilogue()


def _more_files(
    engine: Any, exclude_frozen: bool, deepspeeds: bool, also: Callable[[Path], None] | None, path: Path
) -> None:
    """The model-state file of DeepSpeed, without optimizer state, and the caller's files in folder ``path``."""
    if also is not None:
        also(path)
    if deepspeeds:
        wrapper = engine.optimizer
        wrapper.state_dict = dict
        try:
            write = engine._save_moe_checkpoint if engine.has_moe_layers else engine._save_checkpoint
            write(str(path.parent), path.name, exclude_frozen_parameters=exclude_frozen)
        finally:
            del wrapper.state_dict
