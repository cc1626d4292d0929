"""What a contender of ``bench field`` is: an optimizer of the attention and MLP matrices; AdamW takes the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer

from lorapre_dist.bench.training import BASE_LR, BETAS, EPS
from lorapre_dist.config import extras
from lorapre_dist.config.param_groups import param_groups
from lorapre_dist.optimizers.base import LowRankOptimizer

#: Learning rates that contenders of one kind begin with: of Adam's step, of orthonormal ones, of sign ones.
ADAM_LRS = (0.0005, 0.001, 0.002, 0.004)
MUON_LRS = (0.005, 0.01, 0.02, 0.04)
LION_LRS = (0.0001, 0.0002, 0.0004, 0.0008)


@dataclass(frozen=True)
class Matrices:
    """What a contender steps.

    Attributes:
        named: the attention and MLP matrices with their names.
        rank: of the contender's factors or projections; 0: it has none.
        config: the model's, of Hugging Face.
    """

    named: list[tuple[str, nn.Parameter]]
    rank: int
    config: Any

    @property
    def params(self) -> list[nn.Parameter]:
        """The matrices alone."""
        return [p for _, p in self.named]


Build = Callable[..., Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer of matrices, and where it comes from.

    Attributes:
        label: in the tables.
        build: the optimizer of (:class:`Matrices`, lr), and of options where the contender is one of ours.
        lrs: learning rates of the matrices that are tried first, in rising order.
        share: the rank is the model's hidden size divided by this; None: no rank.
        package: the distribution that has it; None: torch, or this project.
        modules: what is imported of it, all of which must be there.
        origin: where it comes from, where that is no distribution.
        cannot: why it cannot be run here, where it stays a row that says so.
        iterates_in_bf16: it orthogonalises in bf16, for which CPUs have no fast products: there, it does in fp32.
    """

    label: str
    build: Build
    lrs: tuple[float, ...]
    share: int | None = None
    package: str | None = None
    modules: tuple[str, ...] = ()
    origin: str = "torch"
    iterates_in_bf16: bool = False
    cannot: str = ""

    @property
    def obstacle(self) -> str:
        """Why it cannot be run as things are, "" where it can."""
        if all(map(extras.has, self.modules)):
            return self.cannot
        return self.cannot or f"not installed: pip install {self.package}"

    def rank(self, model: Any) -> int:
        """Rank for a model of its hidden size; 0: it has none."""
        return max(1, model.config.hidden_size // self.share) if self.share else 0


class Beside(Optimizer):
    """A contender for the matrices at ``lr``, and ``torch.optim.AdamW`` for every other parameter at ``BASE_LR``.

    Attributes:
        matrices: the contender's own optimizer.
        seconds: of each of its steps; CPU time of this process, or wall time of the device.
    """

    def __init__(self, model: nn.Module, lr: float, contender: Contender) -> None:
        named, rest = (group["params"] for group in param_groups(model))
        groups: list[dict[str, Any]] = [{"params": [p for _, p in named], "lr": lr}, {"params": [p for _, p in rest]}]
        super().__init__(groups, {"lr": BASE_LR})
        self.device = named[0][1].device
        self.iterates_in_bf16 = contender.iterates_in_bf16
        self.matrices = contender.build(Matrices(named, contender.rank(model), model.config), lr)
        self.adamw = torch.optim.AdamW(self.param_groups[1]["params"], betas=BETAS, eps=EPS, weight_decay=0.0)
        self.seconds: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Both steps, at the learning rates that a schedule has set in our two groups."""
        for theirs, ours in zip((self.matrices, self.adamw), self.param_groups, strict=True):
            for group in theirs.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(ours["lr"])
                else:
                    group["lr"] = ours["lr"]
        begin = self._now()
        with self._precision():
            self.matrices.step()
        self.seconds.append(self._now() - begin)
        self.adamw.step()

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _precision(self) -> AbstractContextManager[Any]:
        if self.iterates_in_bf16 and self.device.type == "cpu":
            return mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)
        return nullcontext()

    def state_bytes(self) -> int:
        """Bytes of the contender's state: all elements that it holds between steps, but for buffers without content."""
        if isinstance(self.matrices, LowRankOptimizer):
            return self.matrices.memory_report().state_bytes
        return sum(min(nbytes, elements) for nbytes, elements in self._storages().values())

    def kept_bytes(self) -> int:
        """Bytes of the storages that it keeps alive between steps: buffers too, and all of what a view is a part of."""
        return sum(nbytes for nbytes, _ in self._storages().values())

    def _storages(self) -> dict[int, tuple[int, int]]:
        """Of every storage but those of weights and gradients its bytes, and those of the tensors that lie in it."""
        known = (t for p in self.param_groups[0]["params"] for t in (p, p.grad) if t is not None)
        own = {t.untyped_storage().data_ptr() for t in known}
        found: dict[int, tuple[int, int]] = {}
        for tensor in held(self.matrices, set()):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                elements = found.get(storage.data_ptr(), (0, 0))[1]
                found[storage.data_ptr()] = storage.nbytes(), elements + tensor.nbytes
        return found


def held(owner: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor within reach of ``owner`` through containers and attributes; ids in ``seen`` are passed by."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, torch.Tensor):
        inner = getattr(owner, "__tensor_flatten__", None)
        if inner is None:
            yield owner
        else:
            for name in inner()[0]:
                yield from held(getattr(owner, name), seen)
        return
    parts: Iterable[Any] = ()
    if isinstance(owner, dict):
        parts = [*owner.keys(), *owner.values()]
    elif isinstance(owner, (list, tuple, set, frozenset)):
        parts = owner
    elif hasattr(owner, "__dict__") and not isinstance(owner, (type, type(torch))) and not callable(owner):
        parts = vars(owner).values()
    for part in parts:
        yield from held(part, seen)
