"""The DeepSpeed engine, and what to say about it at the start and the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import lorapre_dist
from lorapre_dist.config import ConfigError
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.training import models
from lorapre_dist.training.batches import BatchPlan
from lorapre_dist.training.data import TrainingData
from lorapre_dist.training.ds_json import precision, zero_stage
from lorapre_dist.training.plots import PLOT_FILE
from lorapre_dist.training.schedule import scheduler_factory
from lorapre_dist.training.settings import RunSettings


def build_engine(model: PreTrainedModel, settings: RunSettings) -> Any:
    """The model, with the JSON's optimizer and the schedule, under DeepSpeed; a collective.

    Raises:
        ConfigError: the optimizer rejects its options or matches nothing, or DeepSpeed refuses the JSON.
    """
    buffers = models.BufferKeeper(model)
    # DeepSpeed asserts what it does not support; torch's optimizers raise TypeError for an unknown option.
    refusals = (
        (AssertionError,) if settings.ds_config["optimizer"]["type"] in OPTIMIZERS else (AssertionError, TypeError)
    )
    try:
        engine, _, _, _ = lorapre_dist.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=settings.ds_config,
            lr_scheduler=scheduler_factory(settings.warmup_steps, settings.max_steps),
        )
    except refusals as error:
        raise ConfigError(f"--deepspeed_config {settings.deepspeed_config}: DeepSpeed refuses it: {error}") from error
    buffers.restore(engine.module)
    return engine


def start_table(engine: Any, settings: RunSettings, plan: BatchPlan, what: str, data: TrainingData) -> str:
    """Model, batch, data (``what`` is in it) and optimizer state, one line each."""
    accumulation = plan.per_rank // plan.micro_batch
    lines = [
        f"model      {settings.model_name}, {models.count_parameters(engine.module):,} parameters, "
        f"vocabulary {data.vocab_size:,}",
        f"layout     ZeRO-{zero_stage(settings.ds_config)}, {plan.world_size} ranks, {precision(settings.ds_config)}",
        f"batch      {plan.global_batch} x {settings.seq_len} tokens = {plan.world_size} ranks x "
        f"{plan.micro_batch} sequences x {accumulation} accumulation",
        f"data       {settings.dataset}, {what}",
        f"optimizer  {settings.ds_config['optimizer']['type']}{_trained(engine)}",
    ]
    report = memory_report(engine)
    return "\n".join(lines) + (f"\n{report}" if report is not None else "")


def _trained(engine: Any) -> str:
    """How many parameters are trained, if not all."""
    trained = models.count_parameters(engine.module, trained=True)
    return "" if trained == models.count_parameters(engine.module) else f", trains {trained:,} parameters"


def memory_report(engine: Any) -> Any:
    """The optimizer's own account of its state on this rank, ``None`` for an optimizer that keeps none."""
    optimizer = lorapre_dist.deepspeed.base_optimizer(engine)
    return optimizer.memory_report() if hasattr(optimizer, "memory_report") else None


def summary(trainer: Any) -> dict[str, Any]:
    """What ``summary.json`` holds: evaluation before and after, optimizer state per rank, where the plot is."""
    columns = [{k: v for k, v in row.items() if k.startswith("eval_")} for row in trainer.writer.rows]
    columns = [found for found in columns if found] or [{}]
    report = memory_report(trainer.engine)
    return {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        **{f"{name}_before": value for name, value in columns[0].items()},
        **{f"{name}_after": value for name, value in columns[-1].items()},
        "optimizer_state_bytes": getattr(report, "state_bytes", None),
        "adamw_state_bytes": getattr(report, "adamw_state_bytes", None),
        "plot": str(Path(trainer.settings.output_dir) / PLOT_FILE),
    }
