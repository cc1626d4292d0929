"""``release_gradients``: a parameter is stepped in the backward pass, as soon as its gradient is complete.

    one device, TP   when autograd has added up all that a parameter contributes (a post-accumulate hook)
    FSDP2, HSDP      when the shard has been reduced: FSDP2 runs the same hooks then
    DDP              when its bucket has been reduced: a communication hook

A few gradients wait for each other, so that matrices go together and collectives stay few: up to the workspace's
``bucket`` bytes of whole parameters, the same on every rank, and in the order in which the frameworks reduce, which is
the same on every rank as well. What is left waits for ``optimizer.step()``, which then counts the step.

Whether gradients are finite is decided for each of these batches by itself: one that is not changes nothing, and those
before it have been stepped. A parameter whose gradient comes twice in a step would be stepped twice: it is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from ..config.instead import RELEASE_UNDER_DEEPSPEED
from ..layouts import detect
from ..layouts.base import Layout, Unit

if TYPE_CHECKING:
    from .base import LowRankOptimizer

#: Names of parameters and bounds on their gradients' elements.
Looked = list[tuple[str, Tensor]]


class Release:
    """What is on its way in one optimizer's backward pass.

    Attributes:
        waiting: parameters whose gradient is complete, and that are stepped with the next ones.
        arrived: ids of the parameters whose gradient has come since the last ``optimizer.step()``.
        stepped: of these, those that have been stepped.
    """

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hooked: dict[int, Any] = {}
        self._ddp: Any = None
        self._finishing = False
        self.waiting: list[Tensor] = []
        self.arrived: set[int] = set()
        self.stepped: set[int] = set()
        self._taken: list[Tensor] = []
        self._looked: Looked = []
        self.attach()

    def attach(self) -> None:
        """Take the gradients of all parameters that are trained by now."""
        optimizer = self._optimizer()
        for p in _parameters(optimizer):
            if p.requires_grad and id(p) not in self._hooked:
                self._hooked[id(p)] = p.register_post_accumulate_grad_hook(self._complete)

    @torch.no_grad()
    def _complete(self, p: Tensor) -> None:
        """The gradient of ``p`` is there: of this rank alone under DDP, else reduced."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        optimizer._ensure_bound()  # in the first backward pass
        if id(p) in self.arrived:
            name = next(name for name, q, _ in optimizer._named() if q is p)
            raise ConfigError(
                f"release_gradients=True: the gradient of {name} came twice before optimizer.step(), and the first has "
                "been used: gradients cannot be accumulated over backward passes; take all sequences in one, with "
                "activation checkpointing (use_reentrant=False) if they do not fit, or set release_gradients=False"
            )
        self.arrived.add(id(p))
        assert optimizer.layout is not None
        if optimizer.layout.name.startswith("DDP"):
            self._follow(optimizer)
        else:
            self._take([p])

    def _take(self, parameters: Iterable[Tensor]) -> None:
        """Step these with those that wait, once there is enough to go together."""
        self.waiting += parameters
        limit = self._optimizer().workspace.bucket_on(self.waiting[0].device.type)  # type: ignore[union-attr]
        if sum(p.numel() * p.element_size() for p in self.waiting) >= limit:
            self._step(self.waiting)

    def _step(self, parameters: list[Tensor]) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        _clip(optimizer, parameters)
        optimizer._advance(parameters, self)
        for p in parameters:
            p.grad = None
        self.stepped |= {id(p) for p in parameters}
        self.waiting = []

    def left(self, units: list[Unit]) -> list[Unit]:
        """The units of which another rank may have a gradient where this one has none; the same on all ranks.

        None in the backward pass, where batches are what the framework has reduced.
        """
        return [unit for unit in units if id(unit.tensor) not in self.stepped] if self._finishing else []

    def record(self, go: Tensor, looked: Looked) -> None:
        """Whether a batch was stepped (1) or not (0)."""
        self._taken.append(go)
        self._looked += looked

    def finish(self) -> tuple[Tensor, Looked]:
        """Step what is left; whether all of this step's batches were taken. A collective, as every step is."""
        optimizer = self._optimizer()
        for p in _parameters(optimizer):
            if id(p) in self.stepped:  # what a framework has put there since
                p.grad = None
        self._finishing = True
        try:
            self._step([p for p in _parameters(optimizer) if p.grad is not None])
        finally:
            self._finishing = False
        home = self._taken[-1].device
        go, looked = torch.stack([taken.to(home) for taken in self._taken]).amin(), self._looked
        self.arrived, self.stepped, self._taken, self._looked = set(), set(), [], []
        self.attach()
        return go, looked

    # DDP ------------------------------------------------------------------------------------------------------------

    def _follow(self, optimizer: LowRankOptimizer) -> None:
        """Let DDP's reducer tell when a bucket has been reduced, from the first backward pass on."""
        if self._ddp is not None:
            return
        self._ddp = ddp = detect.data_parallel(optimizer._named())
        for option in ("find_unused_parameters", "static_graph"):
            if getattr(ddp, option):
                raise ConfigError(f"release_gradients=True: DistributedDataParallel({option}=True) is not supported")
        try:
            # DDP reads annotations, and does not know those that are strings.
            ddp.register_comm_hook(ddp.process_group, lambda group, bucket: self._reduced(group, bucket))
        except RuntimeError as error:
            raise ConfigError(
                "release_gradients=True: DistributedDataParallel has a communication hook already, and takes one"
            ) from error
        ddp.reducer._set_optimizer_in_backward()  # it does not bring gradients back to the parameters then

    @torch.no_grad()
    def _reduced(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce a bucket as DDP itself does, and step its parameters."""
        allreduce_hook(group, bucket).wait()
        buffer, optimizer = bucket.buffer(), self._optimizer()
        ours = {id(p) for p in _parameters(optimizer)}
        for p, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            # Another optimizer's gradients stay.
            p.grad = gradient.view(p.shape) if id(p) in ours else gradient.view(p.shape).clone()
        mine = [p for p in bucket.parameters() if id(p) in ours]
        if mine:
            self._step(mine)
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer)
        return done


def check_release(layout: Layout) -> None:
    """Raise a ConfigError where gradients cannot be released under a layout."""
    if not layout.native:
        raise ConfigError(RELEASE_UNDER_DEEPSPEED)
    if layout.name == "FSDP1":
        raise ConfigError("release_gradients=True: FSDP1 shows gradients when the backward pass is over; use FSDP2")


def _parameters(optimizer: LowRankOptimizer | None) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []


def _clip(optimizer: LowRankOptimizer, parameters: list[Tensor]) -> None:
    """Scale each gradient down to its group's ``clip_each``, by its own norm; a collective where it is sharded."""
    limits = {id(p): group["clip_each"] for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        limit, grad = limits[id(p)], p.grad
        if limit is not None and grad is not None:
            norm: Any = torch.linalg.vector_norm(grad)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            held: Any = grad.to_local() if isinstance(grad, DTensor) else grad
            held.mul_((limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))
