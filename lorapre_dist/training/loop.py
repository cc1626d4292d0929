"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from lorapre_dist.checkpoint import CheckpointError
from lorapre_dist.training import checkpoints, ranks
from lorapre_dist.training.batches import BatchPlan
from lorapre_dist.training.data import Data
from lorapre_dist.training.engines import Engine
from lorapre_dist.training.evaluation import Evaluation, evaluate
from lorapre_dist.training.interruption import StopRequest
from lorapre_dist.training.metrics import MetricsWriter
from lorapre_dist.training.plots import PLOT_FILE, plot_loss
from lorapre_dist.training.reading import ReadError
from lorapre_dist.training.settings import Settings


class DivergedError(RuntimeError):
    """The training loss is no number any more; every rank raises it at the same step."""


@dataclass
class Trainer:
    """One run. ``step`` counts finished optimizer steps, ``tokens`` what all ranks have trained on.

    Attributes:
        writer: on rank 0 only.
        stop: this rank's note of a signal.
        stopped: the ranks have agreed to end before ``max_steps``; what was trained is saved.
    """

    engine: Engine
    settings: Settings
    data: Data
    plan: BatchPlan
    writer: MetricsWriter | None
    step: int = 0
    tokens: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    stopped: bool = field(default=False, init=False)
    _unwritten: set[str] = field(default_factory=set, init=False)
    _clock: float = field(default=0.0, init=False)
    _clock_tokens: int = field(default=0, init=False)

    def run(self) -> None:
        """Train to ``max_steps``, or until a rank was told to stop; evaluate before, after and in between."""
        settings = self.settings
        self.engine.train()
        if self.step == 0:
            first = evaluate(self.engine, self.data.held_out, self.plan)
            self._write({"step": 0, "loss": None, "tokens": 0} | _eval_columns(first))
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
        own_loss, grad_norm = self._train_step(self._next_batch())
        loss, stop = self._agreed(own_loss)
        self.step += 1
        self.tokens += self.plan.global_batch * settings.seq_len
        last = self.step == settings.max_steps
        self.stopped = stop and not last
        if self.stopped:  # first of all: whoever asked may not wait long
            self._save(final=True)
        evaluated = last or (settings.eval_every > 0 and self.step % settings.eval_every == 0)
        if evaluated or self.step % settings.log_every == 0:
            row = self._row(loss, lr, grad_norm)
            if evaluated:
                row |= _eval_columns(evaluate(self.engine, self.data.held_out, self.plan))
                self._restart_clock()
            self._write(row)
            bar.set_postfix_str(_summary(row), refresh=False)
        bar.update()
        if not self.stopped and (last or (settings.save_every and self.step % settings.save_every == 0)):
            self._save(final=last)
            if not last:
                self._plot()
            self._restart_clock()

    def _next_batch(self) -> torch.Tensor:
        """Where the corpus cannot be read any more, what was trained is saved before the run ends."""
        try:
            return self.data.train.next_batch()
        except ReadError as error:
            if not (self.settings.save_every and self.step):
                raise
            self._save(final=True)
            raise ReadError(f"{error}; saved step {self.step}, start again to go on from there") from error

    def _save(self, final: bool) -> None:
        """A checkpoint that cannot be written ends the run only if it is the last one."""
        if not self.settings.save_every:
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

    def _train_step(self, batch: torch.Tensor) -> tuple[torch.Tensor, float | None]:
        """One optimizer step on this rank's sequences; the mean loss over its micro-batches, and the gradient norm."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.engine.device)
        norm: float | None = None
        micro_batches = batch.split(self.plan.micro_batch)
        for tokens in micro_batches:
            tokens = tokens.to(self.engine.device, non_blocking=True)
            loss = self.engine(input_ids=tokens, labels=tokens).loss
            loss_sum += loss.detach().float()
            self.engine.backward(loss)
            if self.engine.is_gradient_accumulation_boundary():
                norm = self._local_grad_norm()
            self.engine.step()
        reported = self.engine.get_global_grad_norm()
        if reported is not None:
            norm = float(reported)
        return loss_sum / len(micro_batches), norm

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
        if not math.isfinite(loss):
            raise DivergedError(f"the training loss is {loss} at step {self.step}; lower the lr or warm up longer")
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
        }

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.perf_counter(), self.tokens

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            with self._full_disk_is_no_end("the metrics"):
                self.writer.write(row)

    def _plot(self) -> None:
        if self.writer is not None:
            name = self.settings.model or Path(self.settings.model_config or "").stem
            title = f"{name}, {self.settings.ds_config['optimizer']['type']}, {self.settings.dataset}"
            with self._full_disk_is_no_end("the plot"):
                plot_loss(self.writer.rows, Path(self.settings.output_dir) / PLOT_FILE, title)

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


def _eval_columns(result: Evaluation) -> dict[str, Any]:
    return {"eval_loss": result.loss, "eval_ppl": result.perplexity}


def _summary(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}", f"lr {row['lr']:.2e}", f"{row['tokens_per_s']:,.0f} tok/s"]
    if "eval_loss" in row:
        parts.append(f"eval {row['eval_loss']:.3f}")
    return ", ".join(parts)
