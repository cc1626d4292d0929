"""The training that benches compare optimizers by: plain PyTorch on one device, the same for each.

Every run starts from the same weights and sees the same batches in the same order; lr warms up linearly, then decays by
a cosine to a tenth; gradients are clipped to norm 1. Embeddings, lm_head and norms are under AdamW at ``BASE_LR`` in
each. With the same seed, number of threads and PyTorch build the figures repeat exactly.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lorapre_dist.config import extras
from lorapre_dist.training.engines.schedule import scheduler_factory
from lorapre_dist.training.run.settings import BUILTIN, load_settings

if TYPE_CHECKING:
    from lorapre_dist.training.data.sequences import Stream

BASE_LR = 0.01
BETAS = (0.9, 0.99)
EPS = 1e-8
CLIP = 1.0
WARMUP = 40
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Training:
    """What is trained, and on what.

    Attributes:
        model: a preset's name.
        dataset: as in launch/pretrain.py.
        batch: sequences of a step, each of ``seq_len`` tokens.
        warmup: steps of rising lr; at most all of them.
        precision: of forward and backward; ``"bf16"`` is by autocast. Weights are fp32.
        eval_batches: held-out sequences, in batches; 0: all there are.
    """

    model: str = "llama-tiny"
    dataset: str = BUILTIN
    batch: int = 8
    seq_len: int = 128
    warmup: int = WARMUP
    precision: str = "fp32"
    eval_batches: int = 0


@dataclass
class Task:
    """What runs share.

    Attributes:
        training: see there.
        model: with the first weights; runs train copies.
        data: batches ``(batch, seq_len)``, of which ``start`` is the position of the first.
        steps: batches of a run.
        held_out: ``(n, seq_len)``.
        seed: of weights and order.
        digest: of the batches that have been given out since the first.
    """

    training: Training
    model: nn.Module
    data: Stream
    start: dict[str, Any]
    steps: int
    held_out: np.ndarray
    seed: int
    digest: str = ""

    def batches(self) -> Iterator[torch.Tensor]:
        """The batches of a run, from the first one on."""
        self.data.load_state_dict(self.start)
        digest = hashlib.blake2b(digest_size=8)
        for _ in range(self.steps):
            tokens = self.data.next_batch()
            digest.update(tokens.numpy().tobytes())
            self.digest = digest.hexdigest()
            yield tokens


@dataclass
class Run:
    """One run: losses in nats per token (infinite: diverged), ``batches`` a digest of what it trained on.

    ``on_the_way`` are validation losses by step, where they are asked for.
    """

    label: str
    matrix_lr: float
    batches: str = ""
    val_loss: float = math.inf
    seconds: float = 0.0
    train_losses: list[float] = field(default_factory=list)
    on_the_way: dict[int, float] = field(default_factory=dict)


def prepare(training: Training, steps: int, seed: int, data_cache: str) -> Task:
    """Data and initial model by the pre-training program's own pipeline.

    Raises:
        ConfigError: bad options, or a corpus that is too small.
    """
    extras.need("train")
    from lorapre_dist.training.data.batches import BatchPlan
    from lorapre_dist.training.data.sequences import prepare_data
    from lorapre_dist.training.engines.models import build_model, fit_vocabulary, model_config

    options = {
        "model": training.model,
        "dataset": training.dataset,
        "data_cache": data_cache,
        "seq_len": training.seq_len,
        "max_steps": steps,
        "warmup_steps": min(training.warmup, steps),
        "eval_batches": training.eval_batches,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps({"train_batch_size": training.batch, "optimizer": {"type": "AdamW"}}))
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        settings = load_settings(["--deepspeed_config", str(path), *words], world_size=1)
    config = model_config(settings)
    data = prepare_data(settings, BatchPlan(training.batch, training.batch, world_size=1, rank=0), config.vocab_size)
    fit_vocabulary(config, settings, data.tokenizer)
    model = build_model(config, settings)
    return Task(training, model, data.train, data.train.state_dict(), steps, data.held_out, seed)


def steps(
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batch: int | None = None,
    step: Callable[[int], Any] | None = None,
) -> Iterator[tuple[int, float]]:
    """Train ``model``; yields each step's number, from 1, and its training loss, and ends after one that is no number.

    Args:
        task: batches, schedule and precision.
        model: where it is to be trained; its weights are those to begin with.
        optimizer: of it.
        micro_batch: sequences of one forward and backward; default: all of a step's.
        step: makes the optimizer's step, given its number; default: just that.
    """
    scheduler = scheduler_factory(min(task.training.warmup, task.steps), task.steps)(optimizer)
    for number, tokens in enumerate(task.batches(), 1):
        model.train()
        optimizer.zero_grad()
        loss = _backward(model, tokens, micro_batch or len(tokens), task.training.precision)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if step is None:
            optimizer.step()
        else:
            step(number)
        scheduler.step()
        yield number, loss
        if not math.isfinite(loss):
            return


def _backward(model: nn.Module, tokens: torch.Tensor, micro_batch: int, precision: str) -> float:
    """Gradients of the mean loss over ``tokens (batch, seq_len)``, which is returned."""
    device, total = next(model.parameters()).device, 0.0
    for part in tokens.split(micro_batch):
        part = part.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=part, labels=part).loss * (len(part) / len(tokens))
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: np.ndarray, batch: int) -> float:
    """Mean loss in nats per predicted token over all of ``held_out (n, seq_len)``; infinite where it is no number."""
    from lorapre_dist.training.run.evaluation import sequence_losses

    model.eval()
    total, device = 0.0, next(model.parameters()).device
    for start in range(0, len(held_out), batch):
        tokens = torch.from_numpy(held_out[start : start + batch].astype(np.int64)).to(device)
        total += sequence_losses(model(input_ids=tokens).logits, tokens).sum().item()
    mean = total / (len(held_out) * (held_out.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


def train(
    label: str, build: Callable[[nn.Module, float], Optimizer], lr: float, task: Task, eval_at: tuple[int, ...] = ()
) -> Run:
    """Train a copy of the task's model at ``lr`` for the matrices, and evaluate it at the end and after ``eval_at``."""
    begin = time.perf_counter()
    torch.manual_seed(task.seed)
    model = copy.deepcopy(task.model)
    run = Run(label, lr)
    batch = task.training.batch
    for number, loss in steps(task, model, build(model, lr)):
        run.train_losses.append(loss)
        if number in eval_at:
            run.on_the_way[number] = held_out_loss(model, task.held_out, batch)
    run.batches = task.digest
    run.val_loss = held_out_loss(model, task.held_out, batch)
    run.seconds = time.perf_counter() - begin
    return run


def nats(loss: float) -> str:
    """A loss, or that there is none."""
    return f"{loss:.3f}" if math.isfinite(loss) else "diverged"


def signed(difference: float) -> str:
    """A difference of losses, to AdamW's say; of two diverged runs there is none."""
    # Adding 0 turns a rounded -0 into 0.
    return f"{round(difference, 3) + 0.0:+.3f}" if math.isfinite(difference) else "-"


def finite(value: Any) -> Any:
    """``value`` with null for infinities and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
