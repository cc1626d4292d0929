"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from lorapre_dist.checkpoint import CheckpointError
from lorapre_dist.training.data.batches import BatchPlan
from lorapre_dist.training.data.reading import ReadError
from lorapre_dist.training.data.sequences import TrainingData
from lorapre_dist.training.engines import pipeline
from lorapre_dist.training.engines.engines import Engine
from lorapre_dist.training.run import checkpoints, ranks
from lorapre_dist.training.run.evaluation import evaluate
from lorapre_dist.training.run.interruption import StopRequest
from lorapre_dist.training.run.metrics import MetricsWriter
from lorapre_dist.training.run.plots import PLOT_FILE, plot_loss
from lorapre_dist.training.run.settings import RunSettings

#: Seconds from one plot of a run to its next, at the least: all ranks wait while it is drawn.
PLOT_EVERY = 60.0


class DivergedError(RuntimeError):
    """The loss is no number any more, and not because of one batch; every rank raises it at the same step."""


@dataclass
class Trainer:
    """One run. ``step`` counts finished optimizer steps, ``tokens`` what all ranks have trained on.

    What a batch is, its loss and the evaluation are those of pre-training; a subclass may have its own.

    Attributes:
        writer: on rank 0 only.
        stop: this rank's note of a signal.
        stopped: the ranks have agreed to end before ``max_steps``; what was trained is saved.
    """

    engine: Engine
    settings: RunSettings
    data: TrainingData
    plan: BatchPlan
    writer: MetricsWriter | None
    step: int = 0
    tokens: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    stopped: bool = field(default=False, init=False)
    _unwritten: set[str] = field(default_factory=set, init=False)
    _sound: bool = field(default=True, init=False)
    _clock: float = field(default=0.0, init=False)
    _clock_tokens: int = field(default=0, init=False)
    _plotted: float = field(default_factory=time.monotonic, init=False)

    def run(self) -> None:
        """Train to ``max_steps``, or until a rank was told to stop; evaluate before, after and in between."""
        settings = self.settings
        self.engine.train()
        if self.step == 0:
            self._write({"step": 0, "loss": None, "tokens": 0} | self.evaluate())
        bar = tqdm(
            total=settings.max_steps,
            initial=self.step,
            unit="step",
            disable=ranks.rank() != 0 or not settings.progress,
            # In a log file every refresh is a line.
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
        )
        self._restart_clock()
        with bar:
            while self.step < settings.max_steps and not self.stopped:
                self._one_step(bar)
        self._plot()

    def _one_step(self, bar: Any) -> None:
        settings = self.settings
        lr = self.engine.get_lr()[0]
        batch = self._next_batch()
        own_loss, grad_norm = self._train_step(self.micro_batches(batch))
        loss, stop = self._agreed(own_loss)
        self.step += 1
        self._sound = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
        if not (math.isfinite(loss) or hasattr(self.engine.basic_optimizer, "skipped_steps")):  # others step on
            raise DivergedError(f"the training loss is {loss} at step {self.step}; lower the lr or warm up longer")
        self.tokens += self.tokens_in(batch)
        last = self.step == settings.max_steps
        self.stopped = stop and not last
        if self.stopped:  # first of all: whoever asked may not wait long
            self._save(final=True)
        evaluated = last or (settings.eval_every > 0 and self.step % settings.eval_every == 0)
        if evaluated or self.step % settings.log_every == 0:
            row = self._row(loss, lr, grad_norm)
            if evaluated:
                row |= self.evaluate() | self._conditions()
                self._restart_clock()
            self._write(row)
            if not math.isfinite(row.get("eval_loss", 0.0)):  # the weights, not a batch, are no good any more
                text = f"the validation loss is {row['eval_loss']} at step {self.step}"
                raise DivergedError(f"{text}; lower the lr or warm up longer")
            bar.set_postfix_str(_summary(row), refresh=False)
        bar.update()
        if not self.stopped and (last or (settings.save_every and self.step % settings.save_every == 0)):
            self._save(final=last)
            if not last and time.monotonic() - self._plotted > PLOT_EVERY:
                self._plot()
            self._restart_clock()

    def _next_batch(self) -> Any:
        """Where the corpus cannot be read any more, what was trained is saved before the run ends."""
        try:
            return self.data.train.next_batch()
        except ReadError as error:
            if not (self.settings.save_every and self.step):
                raise
            self._save(final=True)
            raise ReadError(f"{error}; saved step {self.step}, start again to go on from there") from error

    def _save(self, final: bool) -> None:
        """A checkpoint that cannot be written ends the run only if it is the last one.

        None is written after a step whose loss or gradient was not finite, unless it is the last one: the step was
        skipped, but whoever resumes there meets the same data next. State that is not finite is never written.
        """
        if not self.settings.save_every:
            return
        if not (self._sound or final):
            if ranks.rank() == 0:
                text = f"warning: no checkpoint at step {self.step}, where loss or gradient are not finite"
                tqdm.write(f"{text}; training goes on", file=sys.stderr)
            return
        try:
            checkpoints.save(self.engine, self.settings, self.data, self.step, self.tokens)
            if final:
                checkpoints.wait(self.engine)
        except CheckpointError as error:
            if final:
                raise
            if ranks.rank() == 0:
                tqdm.write(f"warning: {error}; training goes on", file=sys.stderr)

    def micro_batches(self, batch: Any) -> Sequence[Any]:
        """What this rank's part of a batch is cut into, a forward pass each."""
        return batch.split(self.plan.micro_batch)

    def tokens_in(self, batch: Any) -> int:
        """Tokens of the whole global batch."""
        return self.plan.global_batch * self.settings.seq_len

    def loss(self, micro_batch: Any) -> torch.Tensor:
        """Loss of one forward pass; its mean over micro-batches and ranks is the batch's."""
        tokens = micro_batch.to(self.engine.device, non_blocking=True)
        return self.engine(input_ids=tokens, labels=tokens).loss

    def evaluate(self) -> dict[str, Any]:
        """Columns of metrics, their names beginning with ``eval_``; a collective."""
        how = pipeline.evaluate if self._in_stages else evaluate
        result = how(self.engine, self.data.held_out, self.plan)
        return {"eval_loss": result.loss, "eval_ppl": result.perplexity}

    def _train_step(self, micro_batches: Sequence[Any]) -> tuple[torch.Tensor, float | None]:
        """One optimizer step on this rank's micro-batches; the mean loss over them, and the gradient norm."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.engine.device)
        norm: float | None = None
        if self._in_stages:
            loss_sum += pipeline.train_step(self.engine, micro_batches) * len(micro_batches)
        for micro_batch in micro_batches if not self._in_stages else ():
            loss = self.loss(micro_batch)
            loss_sum += loss.detach().float()
            self.engine.backward(loss)
            if self.engine.is_gradient_accumulation_boundary():
                norm = self._local_grad_norm()
            self.engine.step()
        reported = self.engine.get_global_grad_norm()
        if reported is not None:
            norm = float(reported)
        return loss_sum / len(micro_batches), norm

    @property
    def _in_stages(self) -> bool:
        """Whether the engine is a pipeline's, which runs all micro-batches of a step by itself."""
        return getattr(self.settings, "pipeline", 1) > 1

    def _local_grad_norm(self) -> float | None:
        """Under ZeRO-0 in fp32 DeepSpeed reports no norm, but every rank holds the averaged gradients."""
        if self.settings.zero_stage != 0:
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None

    def _agreed(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The mean loss over the ranks, and whether any of them was told to stop: eight bytes in one collective."""
        both = torch.stack([loss, loss.new_tensor(float(self.stop.signal is not None))])
        if dist.get_world_size() > 1:
            dist.all_reduce(both)
        total, stops = both.tolist()
        return total / dist.get_world_size(), stops > 0

    def _row(self, loss: float, lr: float, grad_norm: float | None) -> dict[str, Any]:
        now = time.perf_counter()
        speed = (self.tokens - self._clock_tokens) / max(now - self._clock, 1e-9)
        self._restart_clock()
        return {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_s": round(speed, 1),
            "grad_norm": grad_norm,
            **({"skipped_steps": skipped} if (skipped := self._skipped()) else {}),
        }

    def _skipped(self) -> int:
        """Steps that changed nothing because a gradient was not finite."""
        return int(getattr(self.engine.basic_optimizer, "skipped_steps", 0))

    def _conditions(self) -> dict[str, float]:
        """The worst of all matrices' first moments; a collective. ``factors_apart`` is of the norms of A and B."""
        optimizer = self.engine.basic_optimizer
        if not hasattr(optimizer, "conditions"):
            return {}
        found = [of["m"] for of in optimizer.conditions().values()]
        apart = [max(c.norm_A, c.norm_B) / max(min(c.norm_A, c.norm_B), 1e-38) for c in found]
        worst = [max(values, default=1.0) for values in (apart, [c.cond_A for c in found], [c.cond_B for c in found])]
        numbers = torch.tensor(worst, dtype=torch.float64, device=self.engine.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return dict(zip(("factors_apart", "cond_AA", "cond_BB"), numbers.tolist(), strict=True))

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.perf_counter(), self.tokens

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            with self._full_disk_is_no_end("the metrics"):
                self.writer.write(row)

    def _plot(self) -> None:
        if self.writer is not None:
            optimizer = self.settings.ds_config["optimizer"]["type"]
            title = f"{Path(self.settings.model_name).stem}, {optimizer}, {self.settings.dataset}"
            with self._full_disk_is_no_end("the plot"):
                plot_loss(self.writer.rows, Path(self.settings.output_dir) / PLOT_FILE, title)
            self._plotted = time.monotonic()

    @contextmanager
    def _full_disk_is_no_end(self, what: str) -> Iterator[None]:
        """What is not a checkpoint may be missing: warn, once for each thing, and train on."""
        try:
            yield
        except OSError as error:
            if what not in self._unwritten:
                self._unwritten.add(what)
                reason = error.strerror or error
                tqdm.write(f"warning: {what} could not be written: {reason}; training goes on", file=sys.stderr)


def _summary(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.2e}", f"{row['tokens_per_s']:,.0f} tok/s"]
    if "eval_loss" in row:
        parts.append(f"eval {row['eval_loss']:.3f}")
    return ", ".join(parts)
