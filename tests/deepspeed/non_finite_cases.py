"""Gradients that are not finite on one rank of a DeepSpeed engine."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

import lorapre_dist
from lorapre_dist import NonFiniteError
from lorapre_dist.optimizers import OPTIMIZERS

from .cases import build, dense, ds_config, full_parameters, merge, params_of, slopes, train, worst

BAD_STEP = 2


def everything(engine: Any) -> dict[Any, torch.Tensor]:
    base = lorapre_dist.deepspeed.base_optimizer(engine)
    found: dict[Any, Any] = dict(full_parameters(engine))
    for bound in base.bound():
        found |= {(bound.piece.name, key): tensor.clone() for key, tensor in bound.state.tensors().items()}
        found[bound.piece.name, "step"] = torch.tensor(bound.state.step)
    return found


def bad_step(engine: Any, rank: int, world_size: int, value: float, module: str = "layers.1.up_proj") -> None:
    """One step, with one such element in the gradient of one module on the last rank."""
    batch = slopes(BAD_STEP, rank, 0, world_size)
    if rank == world_size - 1:
        batch[module].view(-1)[3] = value
    engine.backward(engine(batch))
    engine.step()


def skip_case(
    rank: int,
    world_size: int,
    *,
    stage: int,
    precision: str,
    value: float,
    optimizer: str = "LoRAPre",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Two good steps, a bad one, two good ones."""
    options = params_of(optimizer)
    config = merge(ds_config(stage, precision, 1, 0.0, options), changes or {})
    config["optimizer"]["type"] = optimizer
    engine = build(config)
    base = lorapre_dist.deepspeed.base_optimizer(engine)
    try:
        train(engine, rank, world_size, range(BAD_STEP), 1)
        before = everything(engine)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            bad_step(engine, rank, world_size, value)
        after = everything(engine)
        train(engine, rank, world_size, range(BAD_STEP + 1, 5), 1)
        want = dense(OPTIMIZERS[optimizer].config_class(**options), 5, world_size, 1, 0.0, {BAD_STEP}, False)
        error, name = worst(full_parameters(engine), want)
        return {
            "changed": [str(key) for key, tensor in before.items() if not torch.equal(tensor, after[key])],
            "error": (error, name),
            "skipped": (engine.skipped_steps, base.skipped_steps),
            "said": [str(w.message) for w in said if "not finite" in str(w.message)],
        }
    finally:
        engine.destroy()
        dist.barrier()


def overlap_case(
    rank: int, world_size: int, *, stage: int, optimizers: list[str], folder: str | None
) -> dict[str, Any]:
    """What differs with ``overlap`` after steps of which one is skipped, by optimizer; and how a step waits.

    With a folder, what differs as well where one run resumes from what the other has saved, the other way round.
    """
    found: dict[str, Any] = {}
    for name in optimizers:
        results = []
        for overlap in (False, True):
            engine = _overlapping(stage, name, overlap)
            train(engine, rank, world_size, range(BAD_STEP), 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bad_step(engine, rank, world_size, float("nan"))
            train(engine, rank, world_size, range(BAD_STEP + 1, 5), 1)
            if folder is not None:
                engine.save_checkpoint(folder, tag=f"{name}{overlap}")
            results.append(everything(engine))
            if folder is not None:
                train(engine, rank, world_size, range(5, 7), 1)
                results.append(everything(engine))
            engine.destroy()
            dist.barrier()
        half = len(results) // 2
        for before, after in zip(results[:half], results[half:], strict=True):
            assert before.keys() == after.keys()
            found.setdefault(name, []).extend(str(k) for k, t in before.items() if not torch.equal(t, after[k]))
        for overlap in (False, True) if folder is not None else ():
            engine = _overlapping(stage, name, not overlap)
            engine.load_checkpoint(folder, tag=f"{name}{overlap}")
            assert lorapre_dist.deepspeed.base_optimizer(engine).param_groups[0]["overlap"] is not overlap
            train(engine, rank, world_size, range(5, 7), 1)
            after = everything(engine)
            found[name].extend(f"resumed {k}" for k, t in results[-1].items() if not torch.equal(t, after[k]))
            engine.destroy()
            dist.barrier()
    return found


def _overlapping(stage: int, optimizer: str, overlap: bool) -> Any:
    config = ds_config(stage, "fp32", 1, 0.5, {**params_of(optimizer), "overlap": overlap})
    config["optimizer"]["type"] = optimizer
    return build(config)


def refused_case(rank: int, world_size: int, *, stage: int, changes: dict[str, Any] | None = None) -> str:
    """What two bad steps in a row raise, where two are too many."""
    engine = build(merge(ds_config(stage, "fp32", 1, 0.0, {**params_of("LoRAPre"), "max_skipped": 2}), changes or {}))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                bad_step(engine, rank, world_size, float("nan"))
    except NonFiniteError as error:
        return str(error)
    finally:
        dist.barrier()
        engine.destroy()
    return "accepted"
