"""FSDP2 and DDP behind the methods of a DeepSpeed engine that the training loop uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lorapre_dist.checkpoint import native, run
from lorapre_dist.config.ds_training import clipping, precision, releases_gradients, sixteen_bit_weights
from lorapre_dist.integrations.deepspeed import checkpoint as engine_checkpoints
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.training.engines.schedule import scheduler_factory
from lorapre_dist.training.run import ranks
from lorapre_dist.training.run.settings import Settings


class NativeEngine:
    """The model with the optimizer of the DeepSpeed JSON and the schedule; a collective.

    fp32 master weights. With bf16 FSDP2 computes in bf16 (``MixedPrecisionPolicy``) and DDP under ``torch.autocast``;
    gradients are reduced in fp32. Where the optimizer's ``weights`` are for bf16 the model is bf16 all through, and DDP
    reduces in bf16; one rank is not wrapped. Under FSDP2 gradients stay sharded between micro-batches; under DDP the
    last one reduces.

    Raises:
        ConfigError: the optimizer rejects its options or matches nothing.
    """

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self.device = ranks.device()
        self.module: Any = model
        self._model: nn.Module = model
        self._autocast = False
        if settings.backend == "ddp":
            if ranks.world_size() > 1:  # one rank has nothing to reduce, and needs no buckets
                indices = [self.device.index] if self.device.type == "cuda" else None
                self._model = DistributedDataParallel(self.module, device_ids=indices, gradient_as_bucket_view=True)
            self._autocast = precision(settings.ds_config) == "bf16" and not sixteen_bit_weights(settings.ds_config)
        wanted = settings.ds_config["optimizer"]
        self.basic_optimizer = OPTIMIZERS[wanted["type"]](self.module, **(wanted.get("params") or {}))
        self.basic_optimizer.bound()  # the layout is found here, not in the first step
        self.lr_scheduler = scheduler_factory(settings.warmup_steps, settings.max_steps)(self.basic_optimizer)
        self._clip = clipping(settings.ds_config)
        self._released = releases_gradients(settings.ds_config)
        self._accumulation = settings.batch.accumulation
        self._micro_steps = 0
        self._norm: float | None = None

    def __call__(self, **inputs: Any) -> Any:
        """The model's output."""
        if isinstance(self._model, DistributedDataParallel):
            self._model.require_backward_grad_sync = self.is_gradient_accumulation_boundary()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self._model(**inputs)

    def train(self) -> None:
        """Switch dropout on."""
        self._model.train()

    def eval(self) -> None:
        """Switch dropout off."""
        self._model.eval()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-batch is the last of its step."""
        return (self._micro_steps + 1) % self._accumulation == 0

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """After the last micro-batch: clip, step, move the schedule on (as DeepSpeed unless the step was skipped)."""
        if self.is_gradient_accumulation_boundary():
            self._norm = None if self._released else self._clipped()
            self.basic_optimizer.step()
            if not self.basic_optimizer.overflow:
                self.lr_scheduler.step()
            self.basic_optimizer.zero_grad()
        self._micro_steps += 1

    def _clipped(self) -> float:
        """Clip the gradients by their global norm, if they are to be; the norm before."""
        alike: dict[Any, list[nn.Parameter]] = {}
        for p in self.module.parameters():
            if p.grad is not None:  # experts may lie on a mesh of their own
                alike.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        norms = [torch.nn.utils.get_total_norm([p.grad for p in some]) for some in alike.values()]
        norm = torch.nn.utils.get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
        if self._clip > 0.0:
            for some in alike.values():
                torch.nn.utils.clip_grads_with_norm_(some, self._clip, norm)
        return float(norm.item())

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; None where they have been released."""
        return self._norm

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group in the next step."""
        return [group["lr"] for group in self.basic_optimizer.param_groups]

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str,
        client_state: dict[str, Any],
        *,
        keep_last: int | None = None,
        background: bool = False,
        also: Callable[[Path], None] | None = None,
    ) -> None:
        """As :func:`lorapre_dist.integrations.deepspeed.checkpoint.save`."""
        engine_checkpoints.wait(self)
        parts = {"lr_scheduler": self.lr_scheduler, "extra": client_state, "also": also}
        job = native.job(self.module, self.basic_optimizer, **parts)
        if not background:
            run.save(job, save_dir, tag, keep_last=keep_last)
            return
        if not hasattr(self, "_lorapre_group"):
            self._lorapre_group = run.background_group()
        # Where engine_checkpoints.wait looks.
        self._lorapre_pending = run.save_in_background(
            job, save_dir, tag, group=self._lorapre_group, keep_last=keep_last
        )

    def load_checkpoint(self, load_dir: str, tag: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """As DeepSpeed's engine does with ours; ``options`` are ``verify``, ``resize_rank`` and ``check``."""
        engine_checkpoints.wait(self)
        client_state = native.load(
            self.module, self.basic_optimizer, load_dir, tag, lr_scheduler=self.lr_scheduler, **options
        )
        assert client_state is not None  # the tag was named
        return str(Path(load_dir) / tag), client_state

    def destroy(self) -> None:
        """Wait for a background save, and for what the optimizer does behind training."""
        engine_checkpoints.wait(self)
        self.basic_optimizer.synchronize()
