"""Checkpoints of a run: what they hold beside DeepSpeed's own files, and which one to resume from."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lorapre_dist.config import ConfigError
from lorapre_dist.training import ranks
from lorapre_dist.training.data import Data, Stream
from lorapre_dist.training.ds_json import precision, zero_stage
from lorapre_dist.training.files import write_atomically
from lorapre_dist.training.settings import Settings
from lorapre_dist.training.streaming import merge_states

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT = 1


def checkpoint_folder(settings: Settings) -> Path:
    """Where the run's checkpoints are, one sub-folder per tag."""
    return Path(settings.output_dir) / FOLDER


def identity(settings: Settings, data: Data) -> dict[str, Any]:
    """What must be the same in a resumed run for it to continue the interrupted one."""
    return {
        "world_size": ranks.world_size(),
        "zero_stage": zero_stage(settings.ds_config),
        "precision": precision(settings.ds_config),
        "optimizer": settings.ds_config["optimizer"]["type"],
        "model": settings.model or settings.model_config,
        "dataset": data.fingerprint,
        "vocab_size": data.vocab_size,
        "seq_len": settings.seq_len,
        "train_batch_size": settings.batch.global_batch,
        "seed": settings.seed,
    }


def find_checkpoint(settings: Settings) -> str | None:
    """The tag to resume from, ``None`` to start afresh.

    Raises:
        ConfigError: the named tag is not there, or its manifest or that of the latest is missing or damaged.
    """
    folder = checkpoint_folder(settings)
    if settings.resume == "none":
        return None
    if settings.resume == "auto":
        if not (folder / LATEST).is_file():
            return None
        tag = (folder / LATEST).read_text(encoding="utf-8").strip()
    else:
        tag = settings.resume
    if not tag or not (folder / tag).is_dir():
        known = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        raise ConfigError(
            f"--resume {settings.resume}: no checkpoint {tag!r} in {folder}; there: {', '.join(known) or 'none'}"
        )
    return tag


def read_manifest(settings: Settings, tag: str) -> dict[str, Any]:
    """The manifest of checkpoint ``tag``.

    Raises:
        ConfigError: missing or damaged: the checkpoint was not completed by this program.
    """
    path = checkpoint_folder(settings) / tag / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ConfigError(f"checkpoint {tag}: format {manifest['format']}, this version reads {FORMAT}")
        if not isinstance(manifest["step"], int) or not manifest["files"] or not manifest["identity"]:
            raise KeyError("step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"checkpoint {path.parent} is incomplete or corrupt: no usable {MANIFEST}") from error
    return manifest


def check_checkpoint(settings: Settings, data: Data, tag: str, manifest: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` if the checkpoint is of another run or damaged.

    Each rank reads its part of the files through, so that together they check all of them.
    """
    wanted = identity(settings, data)
    for name, value in wanted.items():
        saved = manifest["identity"].get(name)
        if saved != value:
            raise ConfigError(f"cannot resume {tag}: its {name} is {saved!r}, this run's is {value!r}")
    if manifest["step"] > settings.max_steps:
        raise ConfigError(
            f"cannot resume {tag}: it stands at step {manifest['step']}, --max_steps is {settings.max_steps}"
        )
    folder = checkpoint_folder(settings) / tag
    for name in sorted(manifest["files"])[ranks.rank() :: ranks.world_size()]:
        problem = _damage(folder / name, manifest["files"][name])
        if problem:
            raise ConfigError(f"checkpoint {folder} is corrupt: {name} {problem}")


def _damage(path: Path, size: int) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {size}"
    if path.suffix == ".pt":
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            return f"cannot be read ({error})"
        if bad is not None:
            return "has a wrong checksum"
    return None


def save(engine: Any, settings: Settings, data: Data, step: int, tokens: int) -> str:
    """Save everything at ``step``; a collective. The pointer to the latest is written last, so a kill loses nothing."""
    folder, tag = checkpoint_folder(settings), f"step{step:07d}"
    state = {"step": step, "tokens": tokens, "data": _gathered_position(data.train), "rng": _gathered(rng_state())}
    if ranks.rank() == 0:
        (folder / tag / MANIFEST).unlink(missing_ok=True)
    engine.save_checkpoint(str(folder), tag=tag, client_state={"trainer": state}, save_latest=False)
    dist.barrier()
    if ranks.rank() == 0:
        files = {str(p.relative_to(folder / tag)): p.stat().st_size for p in (folder / tag).rglob("*") if p.is_file()}
        manifest = {"format": FORMAT, "step": step, "identity": identity(settings, data), "files": files}
        write_atomically(folder / tag / MANIFEST, json.dumps(manifest, indent=1))
        write_atomically(folder / LATEST, tag)
    dist.barrier()
    return tag


def load(engine: Any, settings: Settings, data: Data, tag: str) -> tuple[int, int]:
    """Load checkpoint ``tag`` into the engine, the data stream and the RNGs; returns its step and tokens so far.

    Raises:
        ConfigError: the files cannot be loaded into this run.
    """
    folder = checkpoint_folder(settings)
    try:
        path, client_state = engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ConfigError(f"checkpoint {folder / tag} cannot be loaded: DeepSpeed found no files in it")
        state = client_state["trainer"]
        data.train.load_state_dict(state["data"])
        set_rng_state(state["rng"][ranks.rank()])
    except ConfigError:
        raise
    except Exception as error:  # torch and DeepSpeed raise many kinds on a damaged or foreign file
        raise ConfigError(f"checkpoint {folder / tag} cannot be loaded: {type(error).__name__}: {error}") from error
    return int(state["step"]), int(state["tokens"])


def forget_latest(settings: Settings) -> None:
    """Before a fresh start in a used folder: no later ``--resume auto`` may find the earlier run."""
    (checkpoint_folder(settings) / LATEST).unlink(missing_ok=True)


def _gathered_position(stream: Stream) -> dict[str, Any]:
    return merge_states(_gathered(stream.state_dict()))


def _gathered(value: Any) -> list[Any]:
    """Every rank's ``value``, on every rank: DeepSpeed keeps one rank's client state under ZeRO-0/1/2."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy(), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
