"""What every training program does around its loop, from command line to clean exit."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorapre_dist.checkpoint.folder import write_atomically
from lorapre_dist.config import ConfigError
from lorapre_dist.training import ranks
from lorapre_dist.training.settings import RunSettings, describe

if TYPE_CHECKING:
    from lorapre_dist.training.data import TrainingData
    from lorapre_dist.training.loop import Trainer
    from lorapre_dist.training.metrics import MetricsWriter

# A build of DeepSpeed's CPU op takes 1 to 4 minutes.
BUILD_SECONDS = 900.0

AnySettings = TypeVar("AnySettings", bound=RunSettings)


def run(
    argv: Sequence[str] | None,
    load: Callable[[Sequence[str] | None, int], AnySettings],
    set_up: Callable[[AnySettings], Trainer],
    finish: Callable[[Trainer], None],
) -> int:
    """Run a program: settings from ``load(argv, world_size)``, then ``finish(trainer)`` after its loop.

    Exit code 0; 2 after one line on stderr about bad input; 1 where training diverged or could not save its end.
    """
    try:
        ranks.fill_launch_environment()
        settings = load(argv, ranks.world_size())
        _quiet()
        _check_optimizer(settings)
        _check_resume(settings)
        return _train(settings, set_up, finish)
    except ConfigError as error:
        return ranks.report(error)
    except KeyboardInterrupt:
        return 130


def _quiet() -> None:
    """Leave the terminal to the table and the progress bar."""
    # DeepSpeed calls torch.distributed by names that newer torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _check_optimizer(settings: RunSettings) -> None:
    name = settings.ds_config["optimizer"]["type"]
    if name == "LoRAPre":
        from lorapre_dist.deepspeed import check_config

        check_config(settings.ds_config)
        return
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    known = ["LoRAPre", *(n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type))]
    if name not in known and name.lower() not in DEEPSPEED_OPTIMIZERS:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"optimizer.type {name!r} is unknown: did you mean {near[0] if near else 'LoRAPre'}?")


def _check_resume(settings: RunSettings) -> None:
    from lorapre_dist.training.checkpoints import check_named

    check_named(settings)


def _train(settings: AnySettings, set_up: Callable[[AnySettings], Trainer], finish: Callable[[Trainer], None]) -> int:
    import deepspeed

    _check_deepspeed_config(settings)
    _check_build_lock()
    deepspeed.init_distributed(verbose=False)
    from lorapre_dist.checkpoint import CheckpointError
    from lorapre_dist.training.loop import DivergedError

    try:
        trainer = set_up(settings)
        trainer.run()
        finish(trainer)
        trainer.engine.destroy()
    except (DivergedError, CheckpointError) as error:
        if ranks.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
    return 0


def _check_deepspeed_config(settings: RunSettings) -> None:
    """Let DeepSpeed's own config class read the JSON before anything is built."""
    from deepspeed.runtime.config import DeepSpeedConfig

    copy = json.loads(json.dumps(settings.ds_config))
    # Before the process group exists DeepSpeed takes the world to be one rank.
    copy["train_batch_size"] = settings.batch.micro_batch * settings.batch.accumulation
    try:
        DeepSpeedConfig(copy)
    except Exception as error:  # assertions, pydantic errors and its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"--deepspeed_config {settings.deepspeed_config}: {'; '.join(lines[:3])}") from error


def _check_build_lock() -> None:
    """A killed build of DeepSpeed's CPU op leaves a lock that every later process would wait on for ever."""
    import torch
    from torch.utils.cpp_extension import _get_build_directory

    if torch.cuda.is_available():
        return
    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > BUILD_SECONDS:
        raise ConfigError(f"{lock} was left by a killed build of DeepSpeed's CPU op; delete it and start again")


def start(
    settings: RunSettings,
    data: TrainingData,
    build: Callable[[], Any],
    table: Callable[[Any], str],
) -> tuple[Any, MetricsWriter | None, int, int]:
    """Engine from ``build()``, resumed where there is something to resume; the writer (rank 0), step and tokens.

    Raises:
        ConfigError: the folder cannot be written to, or the checkpoint does not fit.
    """
    from lorapre_dist.training import checkpoints
    from lorapre_dist.training.metrics import MetricsWriter

    with ranks.together():
        make_output_folder(settings)
        path, complaints = checkpoints.choose(settings)
    engine = build()
    checkpoints.seed_everything(settings.seed, ranks.rank())
    step = tokens = 0
    if path is not None:
        step, tokens = checkpoints.load(engine, settings, data, path)
    if ranks.rank() != 0:
        return engine, None, step, tokens
    aside = checkpoints.set_aside(settings) if path is None else None
    print(table(engine), flush=True)
    for line in complaints:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    if path is not None:
        print(f"resuming from {path.name} at step {step}", flush=True)
    if aside is not None:
        print(f"starting afresh; earlier checkpoints are now in {aside}", flush=True)
    writer = MetricsWriter(settings, step)
    write_atomically(Path(settings.output_dir) / "settings.json", json.dumps(describe(settings), indent=1))
    return engine, writer, step, tokens


def make_output_folder(settings: RunSettings) -> None:
    """Make the folder; raise a ConfigError if nothing can be written there."""
    folder = Path(settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{ranks.rank()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be written: {error.strerror}") from error


def write_summary(settings: RunSettings, result: dict[str, Any]) -> None:
    """``summary.json`` in the run's folder."""
    write_atomically(Path(settings.output_dir) / "summary.json", json.dumps(result, indent=1))
