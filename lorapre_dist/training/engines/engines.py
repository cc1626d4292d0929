"""The engine that trains, under DeepSpeed or not, and what to say about it at the start and the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

import lorapre_dist
from lorapre_dist.config import ConfigError
from lorapre_dist.config.ds_training import clipping, ignored, precision
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.sequences import TrainingData
from lorapre_dist.training.engines import models, pipeline, selection
from lorapre_dist.training.engines.native import NativeEngine
from lorapre_dist.training.engines.schedule import scheduler_factory
from lorapre_dist.training.run import ranks
from lorapre_dist.training.run.plots import PLOT_FILE
from lorapre_dist.training.run.settings import RunSettings


class Engine(Protocol):
    """What the training loop uses of a DeepSpeed engine; :class:`NativeEngine` has it for FSDP2 and DDP.

    Attributes:
        module: the model.
        device: where its inputs go.
        basic_optimizer: what steps.
    """

    module: Any
    device: Any
    basic_optimizer: Any

    def __call__(self, **inputs: Any) -> Any:
        """The model's output."""

    def train(self) -> Any:
        """Switch dropout on."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def backward(self, loss: Any) -> Any:
        """Add the gradients of one micro-batch, whose mean loss this is."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-batch is the last of its step."""

    def step(self) -> None:
        """After each micro-batch; after the last of a step clip, step and forget the gradients."""

    def get_global_grad_norm(self) -> Any:
        """Norm of the last step's gradients before clipping; None where it is not known."""

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group in the next step."""

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, Any], **options: Any) -> Any:
        """:func:`lorapre_dist.integrations.deepspeed.checkpoint.save`."""

    def load_checkpoint(self, load_dir: str, tag: str, **options: Any) -> tuple[Any, Any]:
        """:func:`lorapre_dist.integrations.deepspeed.checkpoint.load`."""

    def destroy(self) -> None:
        """Wait for what is under way and give back what is held."""


def build_engine(model: PreTrainedModel, settings: RunSettings) -> Engine:
    """Model, optimizer and schedule under the backend; a collective.

    Args:
        model: of :func:`models.build_model`, or one to fine-tune.

    Raises:
        ConfigError: the optimizer rejects its options or matches nothing, or DeepSpeed refuses the JSON.
    """
    if settings.backend != "deepspeed":
        return NativeEngine(model, settings)
    module, stages, parts = model, getattr(settings, "pipeline", 1), getattr(settings, "tensor", 1)
    whole = models.outline(model.config) if stages * parts > 1 else None
    if stages > 1:
        module = pipeline.pipeline(model, stages, parts)
        del model
    buffers = models.BufferKeeper(module)
    # How DeepSpeed says what it does not support; torch's optimizers raise TypeError for an unknown option.
    refusals: tuple[type[Exception], ...] = (AssertionError, ValueError, KeyError, NotImplementedError)
    if settings.ds_config["optimizer"]["type"] not in OPTIMIZERS:
        refusals += (TypeError,)
    try:
        engine, _, _, _ = lorapre_dist.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=settings.ds_config,
            lr_scheduler=scheduler_factory(settings.warmup_steps, settings.max_steps),
        )
    except ConfigError:
        raise
    except refusals as error:
        raise ConfigError(f"--deepspeed_config {settings.deepspeed_config}: DeepSpeed refuses it: {error}") from error
    buffers.restore(engine.module)
    if whole is not None:
        engine.module.whole = (whole,)  # in a tuple, so that it is no part of the module
    return engine


def start_table(engine: Any, settings: RunSettings, plan: BatchPlan, what: str, data: TrainingData) -> str:
    """Model, batch, data (``what`` is in it) and optimizer state, one line each."""
    accumulation, whole = plan.per_rank // plan.micro_batch, models.whole(engine.module)
    axes = [f"{name} {n}" for name in ("pipeline", "tensor", "expert") if (n := getattr(settings, name, 1)) > 1]
    lines = [
        f"model      {settings.model_name}, {models.count_parameters(whole):,} parameters, "
        f"vocabulary {data.vocab_size:,}, {settings.first_weights}",
        f"layout     {' x '.join([layout_name(settings), *axes])}, {ranks.world_size()} ranks, "
        f"{precision(settings.ds_config)}",
        f"batch      {plan.global_batch} x {settings.seq_len} tokens = {plan.world_size} ranks x "
        f"{plan.micro_batch} sequences x {accumulation} accumulation",
        f"data       {settings.dataset}, {what}",
        f"optimizer  {settings.ds_config['optimizer']['type']}{_trained(engine)}",
        *selection.rows(whole, engine.basic_optimizer),
        f"clipping   {_clipping(settings.ds_config)}",
    ]
    unused = ignored(settings.ds_config) if settings.backend != "deepspeed" else []
    if unused:
        lines.append(f"ignored    of the DeepSpeed JSON: {', '.join(unused)}")
    report = memory_report(engine)
    return "\n".join(lines) + (f"\n{report}" if report is not None else "")


def _clipping(config: dict[str, Any]) -> str:
    """At which norm, and who says so."""
    limit = clipping(config)
    whose = "" if "gradient_clipping" in config else " (DeepSpeed's default)"
    return f"gradients at norm {limit:g}{whose}" if limit else "none"


def layout_name(settings: RunSettings) -> str:
    """ZeRO-2, FSDP2, ..."""
    return settings.backend.upper() if settings.zero_stage is None else f"ZeRO-{settings.zero_stage}"


def _trained(engine: Any) -> str:
    """How many parameters are trained, if not all."""
    whole = models.whole(engine.module)
    trained = models.count_parameters(whole, trained=True)
    return "" if trained == models.count_parameters(whole) else f", trains {trained:,} parameters"


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
