"""What every training program does around its loop, from command line to clean exit."""

from __future__ import annotations

import difflib
import faulthandler
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from lorapre_dist.checkpoint.folder import write_atomically
from lorapre_dist.config import CONFIGS, ConfigError
from lorapre_dist.config.arguments import naming_paths
from lorapre_dist.config.ds_json import naming
from lorapre_dist.integrations.deepspeed import quiet
from lorapre_dist.training.run import discovery, interruption, output_folder, ranks
from lorapre_dist.training.run.settings import RunSettings, describe

if TYPE_CHECKING:
    from lorapre_dist.training.data.sequences import TrainingData
    from lorapre_dist.training.run.loop import Trainer
    from lorapre_dist.training.run.metrics import MetricsWriter

AnySettings = TypeVar("AnySettings", bound=RunSettings)


def run(
    argv: Sequence[str] | None,
    load: Callable[[Sequence[str] | None, int], AnySettings],
    set_up: Callable[[AnySettings], Trainer],
    finish: Callable[[Trainer], None],
) -> int:
    """Run a program: settings from ``load(argv, world_size)``, then ``finish(trainer)`` after its loop.

    Exit code 0; 2 after one line on stderr about bad input; 75 where a signal asked to stop and the state is saved;
    1 where training diverged, could not read on, could not save its end, or lost a rank.
    """
    try:
        interruption.end_with_launcher()
        discovery.find_ranks()
        settings = load(argv, ranks.world_size())
        _check_options(settings)
        _quiet()
        check_config(settings)
        _check_resume(settings)
        return _train(settings, set_up, finish)
    except ConfigError as error:
        return ranks.report(error)
    except KeyboardInterrupt:
        return 130


def script(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` of a training program as all that this process is for, and end with its exit code.

    A crash in native code, of which there is no traceback, says on stderr where each thread of Python was.
    """
    faulthandler.enable()
    interruption.outlive_the_terminal()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and closed. A thread of gloo may still hold the tensors of the last collective; to let go of
    # them it takes the interpreter's lock, and where that is ending torch aborts ("terminate called without an active
    # exception", https://github.com/pytorch/pytorch/issues/190489): a finished run would be taken for a failed one.
    os._exit(code)


def _quiet() -> None:
    """Leave the terminal to the table and the progress bar."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # in one line, as our own
    # DeepSpeed calls torch.distributed by names that newer torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    quiet.deepspeed()


def _check_options(settings: RunSettings) -> None:
    """The optimizer's options, before torch and DeepSpeed are imported, which takes ten seconds."""
    optimizer = settings.ds_config["optimizer"]
    if optimizer["type"] in CONFIGS:
        try:
            CONFIGS[optimizer["type"]].from_params(optimizer.get("params") or {})
        except ConfigError as error:
            raise ConfigError(f"--deepspeed_config {settings.deepspeed_config}: {error}") from error


def check_config(settings: RunSettings) -> None:
    """Let DeepSpeed read the JSON, and ours the optimizer's options, before anything is built."""
    from lorapre_dist.integrations.deepspeed import bind
    from lorapre_dist.optimizers import OPTIMIZERS

    with naming(f"--deepspeed_config {settings.deepspeed_config}"):
        bind.check_config(settings.ds_config)
    name = settings.ds_config["optimizer"]["type"]
    if name in OPTIMIZERS:
        return
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    known = [*OPTIMIZERS, *(n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type))]
    if name not in known and name.lower() not in DEEPSPEED_OPTIMIZERS:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"optimizer.type {name!r} is unknown: did you mean {near[0] if near else 'LoRAPre'}?")


def _check_resume(settings: RunSettings) -> None:
    from lorapre_dist.training.run.checkpoints import check_named

    check_named(settings)


def _train(settings: AnySettings, set_up: Callable[[AnySettings], Trainer], finish: Callable[[Trainer], None]) -> int:
    import deepspeed
    import torch.distributed as dist

    from lorapre_dist.checkpoint import CheckpointError
    from lorapre_dist.optimizers.skipping import NonFiniteError
    from lorapre_dist.training.data.reading import ReadError
    from lorapre_dist.training.run.loop import DivergedError

    trainer, lost = None, None
    try:
        limit = interruption.limit_waits(settings.collective_timeout)
        _join(settings, limit)
        with naming_paths():
            trainer = set_up(settings)
        trainer.stop.listen()
        trainer.run()
        if trainer.stopped:
            return _stopped(trainer)
        finish(trainer)
        trainer.engine.destroy()
    except (DivergedError, NonFiniteError, CheckpointError, ReadError) as error:
        if ranks.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        lost = interruption.lost_rank(error)
        if lost is None:
            raise
        return _lost(settings, trainer, lost)
    finally:
        output_folder.release(Path(settings.output_dir))
        # With a rank gone nobody can be waited for.
        if lost is None and deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        elif lost is None and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _stopped(trainer: Trainer) -> int:
    """Say why the run ends early and whether it can go on; the exit code."""
    import torch.distributed as dist

    settings, step = trainer.settings, trainer.step
    if trainer.writer is not None:
        trainer.writer.close()
        by = trainer.stop.signal or "a signal to another rank"
        from lorapre_dist.training.run.checkpoints import checkpoint_folder

        where = f"saved in {checkpoint_folder(settings) / f'step{step:07d}'}; the same command goes on from there"
        lost = "not saved, as --save_every is 0"
        print(f"stopped by {by} after step {step}: {where if settings.save_every else lost}", flush=True)
    # The first rank to leave may be the sign for the launcher to kill the others.
    dist.barrier()
    return interruption.EXIT_STOPPED if settings.save_every else 1


def _lost(settings: RunSettings, trainer: Trainer | None, reason: str) -> int:
    """One line, from every rank that noticed: the one that is gone, or its host, says nothing."""
    when = "while starting" if trainer is None else f"in step {trainer.step + 1}"
    print(
        f"error on rank {ranks.rank()} ({socket.gethostname()}): lost another rank {when}: {reason}. Its own output or "
        f"its host says why (--collective_timeout is {settings.collective_timeout:g} s); the same command resumes "
        "from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _join(settings: RunSettings, timeout: timedelta) -> None:
    """Start ``torch.distributed``."""
    import torch
    import torch.distributed as dist

    if settings.backend == "deepspeed":
        import deepspeed

        deepspeed.init_distributed(verbose=False, timeout=timeout)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)


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
    from lorapre_dist.training.run import checkpoints
    from lorapre_dist.training.run.metrics import MetricsWriter

    with ranks.together():
        output_folder.claim(Path(settings.output_dir))
    with ranks.together():
        path, complaints = checkpoints.choose(settings)
    engine = build()
    checkpoints.seed_everything(settings.seed, ranks.rank())
    step, tokens, changes = 0, 0, list[str]()
    if path is not None:
        step, tokens, changes = checkpoints.load(engine, settings, data, path)
    if ranks.rank() != 0:
        return engine, None, step, tokens
    aside = checkpoints.set_aside(settings) if path is None else None
    print(table(engine), flush=True)
    for line in complaints:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    if path is not None:
        print("\n".join([f"resuming from {path.name} at step {step}", *changes]), flush=True)
    if aside is not None:
        print(f"starting afresh; earlier checkpoints are now in {aside}", flush=True)
    writer = MetricsWriter(settings, step)
    write_atomically(Path(settings.output_dir) / "settings.json", json.dumps(describe(settings), indent=1))
    return engine, writer, step, tokens


def write_summary(settings: RunSettings, result: dict[str, Any]) -> None:
    """``summary.json`` in the run's folder."""
    write_atomically(Path(settings.output_dir) / "summary.json", json.dumps(result, indent=1))
