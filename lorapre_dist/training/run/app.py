"""The pre-training program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorapre_dist.training.run import program, ranks
from lorapre_dist.training.run.settings import Settings, load_settings

if TYPE_CHECKING:
    from lorapre_dist.training.run.loop import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code is that of :func:`lorapre_dist.training.run.program.run`."""
    return program.run(argv, load_settings, _set_up, _finish)


def _set_up(settings: Settings) -> Trainer:
    from lorapre_dist.training.data.batches import BatchPlan
    from lorapre_dist.training.data.sequences import prepare_data
    from lorapre_dist.training.engines import engines, models
    from lorapre_dist.training.run.loop import Trainer

    replicas = ranks.world_size() // (settings.pipeline * settings.tensor)
    replica = ranks.rank() // settings.tensor % replicas  # of a stage's ranks, neighbours split its matrices
    plan = BatchPlan(settings.batch.global_batch, settings.batch.micro_batch, replicas, replica)
    with ranks.together():
        config = models.model_config(settings)
        data = prepare_data(settings, plan, config.get_text_config().vocab_size)
        models.fit_vocabulary(config, settings, data.tokenizer)
    ranks.agree_on("the text or the tokenizer", data.fingerprint)
    engine, writer, step, tokens = program.start(
        settings,
        data,
        lambda: engines.build_engine(models.build_model(config, settings), settings),
        lambda engine: engines.start_table(engine, settings, plan, f"{len(data.held_out):,} held-out sequences", data),
    )
    return Trainer(engine, settings, data, plan, writer, step, tokens)


def _finish(trainer: Trainer) -> None:
    """Close the logs and say what came out, on rank 0."""
    from lorapre_dist.training.engines.engines import summary

    if trainer.writer is None:
        return
    trainer.writer.close()
    result = summary(trainer)
    program.write_summary(trainer.settings, result)
    before, after = (_shown(result.get(f"eval_loss_{when}")) for when in ("before", "after"))
    print(
        f"eval loss {before} before, {after} after {result['steps']} steps ({result['tokens']:,} tokens); "
        f"plot: {result['plot']}",
        flush=True,
    )


def _shown(loss: float | None) -> str:
    """A loss of a summary: None where it was not finite, or its row of metrics is gone."""
    return "unknown" if loss is None else f"{loss:.4f}"
