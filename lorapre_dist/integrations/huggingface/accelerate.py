"""Hugging Face ``Accelerator`` whose ``save_state`` and ``load_state`` hold LoRAPre's state under every plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from lorapre_dist import checkpoint
from lorapre_dist.optimizers import LowRankOptimizer

FOLDER = "lorapre"


def ranks_without_gpu(fsdp: bool) -> None:
    """Where a launcher found no GPU, start the ranks over gloo, and let FSDP run on them.

    PyTorch's FSDP works on CPU ranks; Accelerate knows it on accelerators alone.
    """
    if "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return
    kind = PartialState(cpu=True).distributed_type
    if fsdp and kind == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class LoRAPreAccelerator(Accelerator):
    """``Accelerator`` for programs that step with :class:`lorapre_dist.LoRAPre` or another optimizer of this package.

    Under the DeepSpeed plugin the engine saves and loads (:mod:`lorapre_dist.integrations.deepspeed.checkpoint`).
    Otherwise (FSDP2, DDP, one process) ``save_state`` puts a checkpoint of :mod:`lorapre_dist.checkpoint.native`
    into its folder, which resumes at any world size and under any of these, where Accelerate's own would hold one
    rank's state or ask for the same layout.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ranks_without_gpu(fsdp=os.environ.get("ACCELERATE_USE_FSDP") == "true" or "fsdp_plugin" in kwargs)
        super().__init__(*args, **kwargs)
        self._aside: list[Any] = []
        self.register_save_state_pre_hook(self._save_ours)
        self.register_load_state_pre_hook(self._load_ours)

    def prepare_optimizer(self, optimizer: Any, device_placement: bool | None = None) -> Any:
        """As Accelerate's, but LoRAPre's state is allocated once the model is sharded and on its device."""
        ours = isinstance(optimizer, LowRankOptimizer)
        return super().prepare_optimizer(optimizer, False if ours else device_placement)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerate's; a collective."""
        with self._without_ours():
            return super().save_state(*args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> Any:
        """As Accelerate's; a collective."""
        with self._without_ours():
            return super().load_state(*args, **kwargs)

    @contextmanager
    def _without_ours(self) -> Iterator[None]:
        """Accelerate does not see our optimizers meanwhile; the hooks save and load them."""
        everything: list[Any] = self._optimizers  # type: ignore[has-type]
        if self.distributed_type != DistributedType.DEEPSPEED:
            self._aside = [o for o in everything if isinstance(getattr(o, "optimizer", None), LowRankOptimizer)]
        self._optimizers = [o for o in everything if o not in self._aside]
        try:
            yield
        finally:
            self._optimizers, self._aside = everything, []

    def _save_ours(self, models: Any, _: Any, output_dir: str) -> None:
        for k, (model, optimizer) in enumerate(self._ours()):
            checkpoint.save(model, optimizer, os.path.join(output_dir, FOLDER), f"optimizer_{k}")

    def _load_ours(self, _: Any, input_dir: str) -> None:
        for k, (model, optimizer) in enumerate(self._ours()):
            checkpoint.load(model, optimizer, os.path.join(input_dir, FOLDER), f"optimizer_{k}")

    def _ours(self) -> Iterator[tuple[Any, LowRankOptimizer]]:
        """Each of our optimizers with the model that it steps."""
        for wrapper in self._aside:
            held = {id(p) for group in wrapper.param_groups for p in group["params"]}
            steps = [m for m in self._models if any(id(p) in held for p in m.parameters())]
            yield (steps or self._models)[0], wrapper.optimizer
