"""What the training loop does differently in fine-tuning: batches, loss and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from lorapre_dist.config.ds_training import zero_stage
from lorapre_dist.training.finetune.data import FinetuneData
from lorapre_dist.training.finetune.examples import IGNORED, ExampleBatch
from lorapre_dist.training.finetune.scoring import score
from lorapre_dist.training.finetune.settings import FinetuneSettings
from lorapre_dist.training.run import ranks
from lorapre_dist.training.run.loop import Trainer


@dataclass
class Finetuner(Trainer):
    """A run of fine-tuning. The loss is the mean over the learnt tokens of the whole global batch.

    So every token weighs the same whichever rank and micro-batch it falls in, and the gradient is the same for any
    world size.
    """

    settings: FinetuneSettings
    data: FinetuneData
    _learnt: int = field(default=0, init=False)

    def micro_batches(self, batch: ExampleBatch) -> Sequence[Any]:
        """The batch's own."""
        self._learnt = batch.learnt
        return batch.micro_batches

    def tokens_in(self, batch: ExampleBatch) -> int:
        """Tokens of all examples, prompts included, padding not."""
        return batch.tokens

    def loss(self, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum over the learnt tokens, weighted so that the mean over micro-batches and ranks is the global mean."""
        device = self.engine.device
        logits = self.engine(input_ids=micro_batch["input_ids"].to(device, non_blocking=True)).logits
        labels = micro_batch["labels"].to(device, non_blocking=True)
        total = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        passes = self.plan.global_batch // self.plan.micro_batch
        return total * (passes / self._learnt)

    def evaluate(self) -> dict[str, Any]:
        """Exact match of every ``--score`` data set; responses go to ``responses/`` in the run's folder."""
        settings, columns = self.settings, {}
        for name, problems in self.data.problems.items():
            result = score(
                self.engine,
                self.data.tokenizer,
                problems,
                batch=settings.score_batch,
                max_new_tokens=settings.max_new_tokens,
                synced=zero_stage(settings.ds_config) == 3,
            )
            columns[f"eval_{name}_exact_match"] = result.exact_match
            columns[f"eval_{name}_answered"] = result.answered
            if ranks.rank() == 0:
                with self._full_disk_is_no_end("the responses"):
                    file = f"{name}-step{self.step:07d}.jsonl"
                    result.write(problems, Path(settings.output_dir) / "responses" / file)
                tqdm.write(
                    f"{name}: {result.exact_match:.1%} right, {result.answered:.1%} answered, of {len(problems):,} "
                    f"problems at step {self.step}"
                )
        return columns
