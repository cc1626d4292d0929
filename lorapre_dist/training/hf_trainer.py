"""Hugging Face ``Trainer`` with LoRAPre: built from names, and saved so that every rank's state comes back."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import save_fsdp_model
from transformers import Trainer

from lorapre_dist import checkpoint
from lorapre_dist.optimizers import LoRAPre, LowRankOptimizer
from lorapre_dist.training.hf_accelerate import ranks_without_gpu

STATE, TAG, SCHEDULER = "lorapre", "state", "scheduler.pt"


class LoRAPreTrainer(Trainer):
    """``Trainer`` whose optimizer is :class:`lorapre_dist.LoRAPre`.

    With ``--deepspeed ds.json`` the optimizer is the JSON's. Otherwise (one process, DDP, FSDP2) it is built here: lr,
    betas, eps and weight decay from the training arguments, the rest from ``lorapre``.

    Args:
        lorapre: options of :class:`lorapre_dist.config.LoRAPreConfig` (``rank``, ``scale``, ...), and ``shard_state``.
    """

    def __init__(self, *args: Any, lorapre: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.lorapre = lorapre or {}
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As ``Trainer``'s; FSDP runs without a GPU too."""
        ranks_without_gpu(fsdp=bool(self.args.fsdp))
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_optimizer
        # Else Accelerate asks for the state before it shards the model, and whole weights and state stay around.
        self.accelerator.prepare_optimizer = lambda optimizer, **_: prepare(optimizer, device_placement=False)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with weight decay where ``Trainer`` has it."""
        if self.optimizer is not None or self.is_deepspeed_enabled:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        model = model if model is not None else self.model
        decayed = set(self.get_decay_parameter_names(model))
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [(n, p) for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
            {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        options = {"lr": self.args.learning_rate, "eps": self.args.adam_epsilon}
        options["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
        self.optimizer = LoRAPre([group for group in groups if group["params"]], **{**options, **self.lorapre})
        return self.optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_fsdp_enabled:  # what Trainer takes the weights from before it asks for the optimizer
            save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir)
        checkpoint.save(self.model, _ours(self.optimizer), os.path.join(output_dir, STATE), TAG)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint_dir)
            return
        checkpoint.load(self.model, _ours(self.optimizer), os.path.join(checkpoint_dir, STATE), TAG)
        state = torch.load(os.path.join(checkpoint_dir, SCHEDULER), weights_only=True)
        self.lr_scheduler.load_state_dict(state)


def _ours(optimizer: Any) -> LowRankOptimizer:
    """The optimizer inside Accelerate's wrapper."""
    while not isinstance(optimizer, LowRankOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
