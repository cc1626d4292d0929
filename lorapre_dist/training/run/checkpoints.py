"""Checkpoints of a run: what they hold beside the engine's state, and which one to resume from.

With LoRAPre the engine saves and loads for any ZeRO stage and world size. Another optimizer's checkpoints are
DeepSpeed's own, for the same stage and world size, but complete or not there just the same.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorapre_dist.checkpoint import CheckpointError, newest_whole
from lorapre_dist.checkpoint.files import weights_only
from lorapre_dist.checkpoint.folder import LATEST, checkpoints, partial, start
from lorapre_dist.checkpoint.run import refuse_non_finite, seal, usable
from lorapre_dist.checkpoint.team import Team
from lorapre_dist.config import ConfigError
from lorapre_dist.config.ds_training import precision
from lorapre_dist.core.comm import all_ranks
from lorapre_dist.integrations.deepspeed import checkpoint as engine_checkpoints
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.training.data.sequences import Stream, TrainingData
from lorapre_dist.training.data.streaming import merge_states
from lorapre_dist.training.engines.models import architecture, whole
from lorapre_dist.training.run import ranks, resumed
from lorapre_dist.training.run.interruption import lost_rank
from lorapre_dist.training.run.settings import RunSettings

FOLDER = "checkpoints"
# Of a Hugging Face model, in every checkpoint: its configuration and tokenizer.
HF_FOLDER = "hf"


def checkpoint_folder(settings: RunSettings) -> Path:
    """Where the run's checkpoints are, one sub-folder per tag."""
    return Path(settings.output_dir) / FOLDER


def identity(settings: RunSettings, data: TrainingData) -> dict[str, Any]:
    """What must be the same in a resumed run for it to continue the interrupted one."""
    same = {**settings.identity(), "dataset": data.fingerprint, "vocab_size": data.vocab_size}
    if not _ours(settings):
        same["world_size"] = ranks.world_size()
        same["zero_stage"] = settings.zero_stage
        same["precision"] = precision(settings.ds_config)
    return same


def _ours(settings: RunSettings) -> bool:
    return settings.ds_config["optimizer"]["type"] in OPTIMIZERS


def check_named(settings: RunSettings) -> None:
    """Raise a ConfigError if ``--resume`` names a checkpoint that is not there; needs no other rank."""
    if settings.resume in ("auto", "none"):
        return
    present = [p.name for p in checkpoints(checkpoint_folder(settings))]
    if settings.resume not in present:
        raise ConfigError(
            f"--resume {settings.resume}: no checkpoint {settings.resume!r} in {checkpoint_folder(settings)}; "
            f"there: {', '.join(present) or 'none'}"
        )


def choose(settings: RunSettings) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, read through, and what is wrong with newer ones; a collective.

    Raises:
        ConfigError: the named one is damaged, or there are checkpoints and none is whole.
    """
    folder = checkpoint_folder(settings)
    if settings.resume == "none":
        return None, []
    if settings.resume != "auto":
        try:
            usable(folder / settings.resume)
        except CheckpointError as error:
            raise ConfigError(f"cannot resume: {error}") from error
        return folder / settings.resume, []
    path, complaints = newest_whole(folder)
    if path is None and complaints:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        raise ConfigError(f"cannot resume: {complaints[0]}{more}; --resume none starts afresh")
    return path, complaints


def save(engine: Any, settings: RunSettings, data: TrainingData, step: int, tokens: int) -> None:
    """Save everything at ``step``; a collective.

    Raises:
        CheckpointError: it could not be written (or, in the background, the one before); training can go on.
    """
    folder, tag = checkpoint_folder(settings), f"step{step:07d}"
    trainer = {"step": step, "tokens": tokens, "data": _gathered_position(data.train), "rng": all_ranks(rng_state())}
    trainer["schedule"] = resumed.schedule(settings)
    client_state = {"trainer": {**trainer, "identity": identity(settings, data)}}

    def hugging_face_files(path: Path) -> None:
        if ranks.rank() == 0:
            config = copy.deepcopy(whole(engine.module).config)
            config.architectures = [architecture(whole(engine.module))]
            config.save_pretrained(path / HF_FOLDER)
            data.tokenizer.save_pretrained(path / HF_FOLDER)

    if _ours(settings):
        background = settings.background_save
        options = {"keep_last": settings.keep_last, "background": background, "also": hugging_face_files}
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, **options)
        return
    team = Team()
    with team.together(f"saving checkpoint {folder / tag}"):
        refuse_non_finite(_tensors(engine))
    with team.together(f"saving checkpoint {folder / tag}"):
        if team.rank == 0:
            start(folder, tag)
            hugging_face_files(partial(folder, tag))
    engine.save_checkpoint(str(folder), tag=partial(folder, tag).name, client_state=client_state, save_latest=False)
    seal(step, partial(folder, tag), tag, team, save_latest=True, keep_last=settings.keep_last)


def _tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's weights, and what another optimizer than ours steps and keeps."""
    for name, p in engine.module.named_parameters():
        yield name, p
    for group in engine.basic_optimizer.param_groups:
        for p in group["params"]:
            yield "a stepped tensor", p
            for key, value in engine.basic_optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    yield f"the optimizer's {key}", value


def load(engine: Any, settings: RunSettings, data: TrainingData, path: Path) -> tuple[int, int, list[str]]:
    """Load a checkpoint that :func:`choose` gave into the engine, the data stream and the RNGs.

    Returns:
        Its step and tokens, and in lines what this run's settings change.

    Raises:
        ConfigError: it is of another run, or does not fit; then nothing of the engine has changed with LoRAPre.
    """
    wanted, own = identity(settings, data), resumed.options(engine)

    def check(client_state: dict[str, Any]) -> None:
        _check_identity(path, client_state, wanted, settings.max_steps)

    try:
        if _ours(settings):
            options = {"verify": False, "resize_rank": settings.resize_rank, "check": check}
            _, client_state = engine.load_checkpoint(str(path.parent), tag=path.name, **options)
        else:
            with weights_only(path):
                loaded, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
            if loaded is None:
                raise ConfigError(f"checkpoint {path} cannot be loaded: DeepSpeed found no files in it")
            check(client_state)
        state = client_state["trainer"]
        lines = resumed.apply(engine, settings, own, state.get("schedule", {}))
        data.train.load_state_dict(state["data"])
        _restore_rng(state["rng"], settings.seed, state["step"])
    except CheckpointError as error:
        raise ConfigError(f"cannot resume: {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # torch and DeepSpeed raise many kinds on a damaged or foreign file
        if lost_rank(error) is not None:
            raise
        raise ConfigError(f"checkpoint {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return int(state["step"]), int(state["tokens"]), lines


def _check_identity(path: Path, client_state: dict[str, Any], wanted: dict[str, Any], max_steps: int) -> None:
    state = client_state.get("trainer")
    if not isinstance(state, dict) or "identity" not in state:
        raise ConfigError(f"cannot resume {path.name}: it was not written by this program")
    for name, value in wanted.items():
        saved = state["identity"].get(name)
        if saved != value:
            raise ConfigError(f"cannot resume {path.name}: its {name} is {saved!r}, this run's is {value!r}")
    if state["step"] > max_steps:
        raise ConfigError(f"cannot resume {path.name}: it stands at step {state['step']}, --max_steps is {max_steps}")


def wait(engine: Any) -> None:
    """Wait for a background save; a collective.

    Raises:
        CheckpointError: it could not be written.
    """
    engine_checkpoints.wait(engine)


def set_aside(settings: RunSettings) -> Path | None:
    """Before a fresh start in a used folder: move its checkpoints away, so that no later resume finds them."""
    folder = checkpoint_folder(settings)
    if not (checkpoints(folder) or (folder / LATEST).exists()):
        return None
    count = 1
    while (aside := folder.with_name(f"{FOLDER}.{count}")).exists():
        count += 1
    folder.rename(aside)
    return aside


def _gathered_position(stream: Stream) -> dict[str, Any]:
    return merge_states(all_ranks(stream.state_dict()))


def rng_state() -> dict[str, Any]:
    """States of the generators that a model or the data may draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": _plain_numpy_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _plain_numpy_state() -> tuple[Any, ...]:
    """NumPy's legacy state with a tensor for its array, so that the file holds nothing but tensors and plain values."""
    name, key, *rest = np.random.get_state()
    return (name, torch.from_numpy(key.astype(np.int64)), *rest)


def _restore_rng(saved: list[dict[str, Any]], seed: int, step: int) -> None:
    """This rank's generators as they were; on a rank that was not there, seeded by where the run stands."""
    if ranks.rank() < len(saved):
        set_rng_state(saved[ranks.rank()])
    else:
        seed_everything(seed + step, ranks.rank())


def seed_everything(seed: int, rank: int) -> None:
    """Each rank draws its own dropout masks; weights and data have seeds of their own."""
    own = seed * 1_000_003 + rank
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy(), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
