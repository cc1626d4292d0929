"""Hugging Face ``Trainer`` with LoRAPre: built from names, and saved so that every rank's state comes back."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import save_fsdp_model
from transformers import Trainer

from lorapre_dist import checkpoint
from lorapre_dist.config import ConfigError, MomentumConfig
from lorapre_dist.integrations.huggingface.accelerate import ranks_without_gpu
from lorapre_dist.optimizers import OPTIMIZERS, LowRankOptimizer

STATE, TAG, SCHEDULER = "lorapre", "state", "scheduler.pt"


class LoRAPreTrainer(Trainer):
    """``Trainer`` whose optimizer is :class:`lorapre_dist.LoRAPre`, or another of this package.

    With ``--deepspeed ds.json`` the optimizer is the JSON's, if it names one. Otherwise it is built here: lr, betas,
    eps and weight decay from the training arguments, the rest from ``lorapre``. Where AdamW has settings of its own
    (``adamw_betas``, ...: :class:`lorapre_dist.LoRAPreMuon`, SGD, Lion), betas and eps are AdamW's.

    Args:
        lorapre: options of the optimizer's config (``rank``, ``scale``, ...), and ``shard_state``. Those that a
            DeepSpeed JSON gives as well must be the same there, as it is with ``Trainer``'s own arguments.
        optimizer_type: its name, as in a DeepSpeed JSON; default: ``"LoRAPre"``.

    Raises:
        ConfigError: there is no such optimizer or option, or the DeepSpeed JSON has another.
    """

    def __init__(
        self, *args: Any, lorapre: dict[str, Any] | None = None, optimizer_type: str | None = None, **kwargs: Any
    ) -> None:
        if optimizer_type is not None and optimizer_type not in OPTIMIZERS:
            raise ConfigError(f"optimizer_type={optimizer_type!r}: must be one of {', '.join(OPTIMIZERS)}")
        self.lorapre, self.optimizer_type = lorapre or {}, OPTIMIZERS[optimizer_type or "LoRAPre"]
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            check_agreement(config.get("optimizer"), self.lorapre, optimizer_type)

    def create_accelerator_and_postprocess(self) -> None:
        """As ``Trainer``'s; FSDP runs without a GPU too."""
        ranks_without_gpu(fsdp=bool(self.args.fsdp))
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_optimizer
        # Else Accelerate asks for the state before it shards the model, and whole weights and state stay around.
        self.accelerator.prepare_optimizer = lambda optimizer, **_: prepare(optimizer, device_placement=False)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer, with weight decay where ``Trainer`` has it."""
        if self.optimizer is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        model = model if model is not None else self.model
        own = "adamw_" if issubclass(self.optimizer_type.config_class, MomentumConfig) else ""
        decayed = set(self.get_decay_parameter_names(model))
        groups = []
        for decays, decay in ((True, self.args.weight_decay), (False, 0.0)):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (n in decayed) == decays]
            if named:
                groups.append({"params": named, "weight_decay": decay, f"{own}weight_decay": decay})
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        options = {"lr": self.args.learning_rate, f"{own}betas": betas, f"{own}eps": self.args.adam_epsilon}
        check_release(self.lorapre, self.args)
        optimizer = self.optimizer_type(groups, **{**options, **self.lorapre})
        optimizer.learn_types(model)
        self.optimizer = optimizer
        return self.optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_fsdp_enabled:  # what Trainer takes the weights from before it asks for the optimizer
            save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir)
        assert isinstance(self.model, torch.nn.Module) and self.lr_scheduler is not None
        checkpoint.save(self.model, _ours(self.optimizer), os.path.join(output_dir, STATE), TAG)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint_dir)
            return
        assert isinstance(self.model, torch.nn.Module) and self.lr_scheduler is not None
        checkpoint.load(self.model, _ours(self.optimizer), os.path.join(checkpoint_dir, STATE), TAG)
        state = torch.load(os.path.join(checkpoint_dir, SCHEDULER), weights_only=True)
        self.lr_scheduler.load_state_dict(state)


def check_agreement(section: Any, options: dict[str, Any], optimizer_type: str | None) -> None:
    """Raise a ConfigError unless a DeepSpeed JSON's ``"optimizer"`` is, where given, what the arguments say."""
    if not section:
        return
    kind, params = section.get("type"), section.get("params") or {}
    if kind != (optimizer_type or kind):
        raise ConfigError(f"optimizer_type={optimizer_type!r}: the DeepSpeed JSON's optimizer.type is {kind!r}")
    if options and kind not in OPTIMIZERS:
        raise ConfigError(f"lorapre={options!r}: the DeepSpeed JSON's optimizer.type is {kind!r}, which has none of it")
    for name, value in options.items():
        there = params.get(name)
        if name not in params or there != (list(value) if isinstance(value, tuple) else value):
            held = repr(there) if name in params else "missing"
            raise ConfigError(f"lorapre {name}={value!r}: in the DeepSpeed JSON, optimizer.params.{name} is {held}")


def check_release(options: dict[str, Any], arguments: Any) -> None:
    """Raise a ConfigError where gradients shall be released, and ``Trainer`` wants all of them."""
    if not options.get("release_gradients"):
        return
    if arguments.max_grad_norm:
        raise ConfigError(
            f"lorapre release_gradients=True: nothing is left to clip at max_grad_norm={arguments.max_grad_norm:g}; "
            "set max_grad_norm=0 (max_update bounds updates, and clip_each clips each gradient by its own norm)"
        )
    if arguments.gradient_accumulation_steps > 1:
        raise ConfigError(
            "lorapre release_gradients=True: gradients cannot be accumulated; set gradient_accumulation_steps=1, with "
            "gradient_checkpointing if the activations do not fit"
        )


def _ours(optimizer: Any) -> LowRankOptimizer:
    """The optimizer inside Accelerate's wrapper."""
    while not isinstance(optimizer, LowRankOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
