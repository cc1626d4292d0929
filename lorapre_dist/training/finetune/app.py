"""The fine-tuning program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorapre_dist.config import ConfigError
from lorapre_dist.training.finetune.settings import FinetuneSettings, load_settings
from lorapre_dist.training.run import program, ranks

if TYPE_CHECKING:
    from lorapre_dist.training.finetune.data import FinetuneData
    from lorapre_dist.training.finetune.loop import Finetuner

#: Sub-folder of a run with the trained model.
MODEL_FOLDER = "model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code is that of :func:`lorapre_dist.training.run.program.run`."""
    return program.run(argv, load_settings, _set_up, _finish)


def _set_up(settings: FinetuneSettings) -> Finetuner:
    from lorapre_dist.training.data.batches import BatchPlan
    from lorapre_dist.training.engines import engines
    from lorapre_dist.training.finetune import models
    from lorapre_dist.training.finetune.data import prepare_data
    from lorapre_dist.training.finetune.loop import Finetuner

    plan = BatchPlan(settings.batch.global_batch, settings.batch.micro_batch, ranks.world_size(), ranks.rank())
    with ranks.together():
        config = models.model_config(settings)
        data = prepare_data(settings, plan)
        settings = with_steps(settings, data)
        models.check_sizes(config, settings, data.vocab_size, _longest(settings, data))
    ranks.agree_on("the examples or the tokenizer", [data.fingerprint, {k: len(v) for k, v in data.problems.items()}])
    engine, writer, step, tokens = program.start(
        settings,
        data,
        lambda: engines.build_engine(models.load_model(config, settings), settings),
        lambda engine: engines.start_table(engine, settings, plan, _what(data), data),
    )
    return Finetuner(engine, settings, data, plan, writer, step, tokens)


def with_steps(settings: FinetuneSettings, data: FinetuneData) -> FinetuneSettings:
    """The settings with the number of steps that ``--epochs`` means, and the warm-up.

    Raises:
        ConfigError: ``--warmup_steps`` is more.
    """
    steps = settings.max_steps
    if steps is None:
        steps = max(1, math.ceil(settings.epochs * data.examples / settings.batch.global_batch))
    warmup = settings.warmup_steps if settings.warmup_steps is not None else math.ceil(0.03 * steps)
    if warmup > max(steps, 1):
        raise ConfigError(f"--warmup_steps {warmup}: more than the {steps} steps of --epochs {settings.epochs:g}")
    return replace(settings, max_steps=steps, warmup_steps=warmup)


def _longest(settings: FinetuneSettings, data: FinetuneData) -> int:
    asked = max((len(p.prompt) for problems in data.problems.values() for p in problems), default=0)
    trained = settings.seq_len if settings.max_steps else 0
    return max(trained, asked + settings.max_new_tokens if asked else 0)


def _what(data: FinetuneData) -> str:
    dropped = f" ({data.dropped:,} too long)" if data.dropped else ""
    scored = "".join(f"; {len(problems):,} problems of {name}" for name, problems in data.problems.items())
    return f"{data.examples:,} examples{dropped}{scored}"


def _finish(trainer: Finetuner) -> None:
    """Write the model folder and say what came out."""
    from lorapre_dist.training.engines.engines import summary
    from lorapre_dist.training.finetune.models import save_model

    settings, folder = trainer.settings, Path(trainer.settings.output_dir) / MODEL_FOLDER
    if settings.max_steps:
        save_model(trainer.engine.module, trainer.data.tokenizer, folder)
    if trainer.writer is None:
        return
    trainer.writer.close()
    result = summary(trainer) | {"model": str(folder) if settings.max_steps else None}
    program.write_summary(settings, result)
    for name in trainer.data.problems:
        before, after = (_shown(result.get(f"eval_{name}_exact_match_{when}")) for when in ("before", "after"))
        change = f"{before} before, {after} after {trainer.step} steps" if trainer.step else after
        print(f"{name}: exact match {change}", flush=True)
    if settings.max_steps:
        merged = " (adapters merged)" if settings.optimizer == "lora" else ""
        print(f"model{merged}: {folder}; plot: {result['plot']}", flush=True)


def _shown(share: float | None) -> str:
    """None where the row of metrics is gone."""
    return "unknown" if share is None else f"{share:.1%}"
