"""What a plan is asked for, checked."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from math import prod

from lorapre_dist.config import ConfigError, LoRAPreConfig, LowRankConfig, others
from lorapre_dist.config.instead import RELEASE_UNDER_DEEPSPEED
from lorapre_dist.config.options import SIXTEEN
from lorapre_dist.config.param_groups import explain_no_match, is_low_rank
from lorapre_dist.layouts.geometry import axes, rows
from lorapre_dist.layouts.geometry.shares import Share

LAYOUTS = ("zero0", "zero1", "zero2", "zero3", "fsdp1", "fsdp2", "hsdp", "tp", "ddp")
#: Those in which ranks hold no more than their part of the weights, or of masters, which can lie in host memory.
OFFLOADING = ("zero1", "zero2", "zero3", "fsdp2", "hsdp")
#: Those under which a model's layers can be dealt out to stages, and matrices split over tensor-parallel ranks as well.
PIPELINED = ("zero0", "zero1", "fsdp2")
SPLIT = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
EXPERTS = ("fsdp2",)
FP32 = 4
BYTES = {"fp32": FP32, "bf16": 2, "fp16": 2}
MAX_WORLD_SIZE = 1 << 20


@dataclass(frozen=True)
class Parameter:
    """A trainable parameter of a model."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's ``zero_optimization`` settings that memory follows from, with DeepSpeed's defaults (elements)."""

    reduce_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    use_multi_rank_bucket_allreduce: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False


@dataclass(frozen=True)
class Part:
    """What of a model a request is for.

    Attributes:
        stage, stages: which stage of a pipeline of how many.
        tensor: a rank's part, where matrices are split over so many.
    """

    stage: int = 0
    stages: int = 1
    tensor: int = 1

    @property
    def last(self) -> bool:
        """Whether it is the last stage, which has the loss."""
        return self.stage == self.stages - 1


@dataclass(frozen=True)
class Request:
    """A model, where its parameters lie, and the optimizer's settings.

    Attributes:
        model: its name, for the report.
        parameters: in the model's order, tied ones once.
        layout: one of :data:`LAYOUTS`.
        world_size: ranks.
        precision: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` compute with fp32 master weights.
        offload: optimizer state and master weights lie in host memory.
        optimizer: settings of one of our optimizers.
        accumulation: micro-batches per optimizer step.
        zero: of DeepSpeed's own buffers.
        cpu: ranks have no accelerator; the r x r solves then go in smaller batches.
        shard_size: ranks that share the parameters under hybrid sharding, which has several such groups.
        shard_state: DDP deals the state out.
        micro_batch, seq_len: sequences of a forward pass, and tokens of each; None: activations are not planned for.
        checkpointing: activations are recomputed in the backward pass, block by block.
        pipeline: stages that the layers are dealt out to; ``accumulation`` micro-batches go through them.
        tensor: ranks that each matrix is split over; what is left of ``world_size`` is data-parallel.
        expert: ranks that the experts of a layer are split over; all other parameters lie over all ranks.
        part: of a request that has been checked; None: it is for a whole model.

    Raises:
        ConfigError: a value that is not allowed, or no parameter would be low-rank.
    """

    model: str
    parameters: tuple[Parameter, ...]
    layout: str = "zero2"
    world_size: int = 1
    precision: str = "bf16"
    offload: bool = False
    optimizer: LowRankConfig = field(default_factory=LoRAPreConfig)
    accumulation: int = 1
    zero: Zero = field(default_factory=Zero)
    cpu: bool = False
    shard_size: int = 8
    shard_state: bool = True
    micro_batch: int = 1
    seq_len: int | None = None
    checkpointing: bool = False
    pipeline: int = 1
    tensor: int = 1
    expert: int = 1
    part: Part | None = None

    def __post_init__(self) -> None:
        if self.part is not None:
            return
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout {self.layout!r}: must be one of {', '.join(LAYOUTS)}")
        if self.precision not in BYTES:
            raise ConfigError(f"precision {self.precision!r}: must be one of {', '.join(BYTES)}")
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            raise ConfigError(f"world_size {self.world_size}: must be from 1 to {MAX_WORLD_SIZE}")
        if self.accumulation < 1:
            raise ConfigError(f"gradient accumulation {self.accumulation}: must be at least 1")
        if self.optimizer.rank < 1:
            raise ConfigError("rank=0: must be at least 1")
        if self.offload and self.layout not in OFFLOADING:
            raise ConfigError(f"offload: needs {', '.join(OFFLOADING[:-1])} or {OFFLOADING[-1]}, not {self.layout}")
        if self.shard_size < 1:
            raise ConfigError(f"shard_size {self.shard_size}: must be at least 1")
        if self.world_size % self.sharing:  # of hybrid sharding
            raise ConfigError(f"shard_size {self.shard_size}: {self.world_size} ranks are no multiple of it")
        self._check_axes()
        self._check_batch()
        self._check_memory_options()
        if not any(self.is_low_rank(p) for p in self.parameters):
            shapes = [(p.name, p.shape) for p in self.parameters]
            ours = self.optimizer
            raise ConfigError(explain_no_match(shapes, ours.rank, ours.target_modules, ours.resolved_rank_v))

    def _check_axes(self) -> None:
        where = {
            "pipeline": (self.pipeline, PIPELINED),
            "tensor": (self.tensor, SPLIT),
            "expert": (self.expert, EXPERTS),
        }
        for name, (count, layouts) in where.items():
            if count < 1:
                raise ConfigError(f"{name} {count}: must be at least 1")
            if count > 1 and self.layout not in layouts:
                others = " or ".join(filter(None, (", ".join(layouts[:-1]), layouts[-1])))
                raise ConfigError(f"{name} {count}: is planned for with {others}, not {self.layout}")
        if self.world_size % self.model_ranks:
            sizes = " x ".join(f"{name} {n}" for name, n in self.axis_sizes.items())
            raise ConfigError(f"{sizes}: {self.world_size} ranks are no multiple of {self.model_ranks}")
        if self.expert > 1:
            self._check_experts()
        if self.pipeline > 1:
            names = {p.name for p in self.parameters}
            if "model.embed_tokens.weight" in names and "lm_head.weight" not in names:
                raise ConfigError(f"pipeline {self.pipeline}: tied embeddings are not planned for; untie them")
            if self.optimizer.release_gradients:
                raise ConfigError(
                    "release_gradients=True: a pipeline's gradients are of several micro-batches; leave it"
                )
            try:
                self.stages  # noqa: B018
            except ValueError as error:
                raise ConfigError(f"pipeline {self.pipeline}: {error}") from error

    def _check_experts(self) -> None:
        counts = {p.shape[0] for p in self.parameters if self.is_stack(p.shape)}
        if self.pipeline * self.tensor > 1:
            raise ConfigError(f"expert {self.expert}: is not planned for with pipeline or tensor; take one of them")
        if not counts:
            raise ConfigError(f"expert {self.expert}: {self.model} has no experts in stacks; take 1")
        if any(count % self.expert for count in counts):
            raise ConfigError(f"expert {self.expert}: must divide the {min(counts)} experts of a layer")

    @staticmethod
    def is_stack(shape: tuple[int, ...]) -> bool:
        """Whether a parameter is of several experts, which expert parallelism splits."""
        return len(shape) == 3

    @property
    def model_ranks(self) -> int:
        """Ranks that have one copy of the model together, data parallelism apart."""
        return self.pipeline * self.tensor * self.expert

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the axes beside data parallelism, those of one rank left out."""
        sizes = {"pipeline": self.pipeline, "tensor": self.tensor, "expert": self.expert}
        return {name: n for name, n in sizes.items() if n > 1}

    @functools.cached_property
    def stages(self) -> tuple[Request, ...]:
        """A request for each stage of the pipeline; of one stage, this one."""
        if self.pipeline == 1:
            return (self,)
        by_name = {p.name: p for p in self.parameters}
        found = []
        for k, names in enumerate(axes.stages([(p.name, p.shape) for p in self.parameters], self.pipeline)):
            mine, part = tuple(by_name[name] for name in names), Part(k, self.pipeline)
            ranks = self.world_size // self.pipeline
            found.append(replace(self, parameters=mine, world_size=ranks, pipeline=1, part=part))
        return tuple(found)

    @functools.cached_property
    def local(self) -> Request:
        """A request for what the first tensor-parallel rank has, which is most; without this axis, this one."""
        if self.tensor == 1:
            return self
        mine = axes.local([(p.name, p.shape) for p in self.parameters], self.tensor, self.split_dim)[0]
        parameters = tuple(Parameter(name, shape) for name, shape in mine)
        part = replace(self.part or Part(), tensor=self.tensor)
        return replace(self, parameters=parameters, world_size=self.world_size // self.tensor, tensor=1, part=part)

    def split_dim(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Along which dimension tensor parallelism splits a parameter; None: not at all."""
        return rows.split_dim(name, shape, head=self.layout.startswith("zero"))

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations a stage holds at a time, under 1F1B: fewer in later stages."""
        return 1 if self.part is None else min(self.part.stages - self.part.stage, self.accumulation)

    @property
    def bubble(self) -> float:
        """The share of a step's time in which a stage waits for others, under 1F1B and where all take equally long."""
        return (self.pipeline - 1) / (self.accumulation + self.pipeline - 1)

    def _check_batch(self) -> None:
        for name, value in (("micro_batch", self.micro_batch), ("seq_len", self.seq_len)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
        if self.layout == "tp" and self.seq_len is not None:
            raise ConfigError("seq_len: activations under tp are not planned for; leave it out")

    def _check_memory_options(self) -> None:
        ours, engine = self.optimizer, self.layout.startswith("zero")
        if ours.weights in SIXTEEN and self.precision != "bf16":
            raise ConfigError(f"weights={ours.weights!r}: is for bf16 weights, not {self.precision}")
        if ours.weights in SIXTEEN and self.layout == "zero0":
            raise ConfigError(
                f"weights={ours.weights!r}: ZeRO stage 0 keeps fp32 masters; take stage 1, 2 or 3, or ddp"
            )
        if not ours.release_gradients:
            return
        if engine:
            raise ConfigError(RELEASE_UNDER_DEEPSPEED)
        if self.layout == "fsdp1":
            raise ConfigError("release_gradients=True: FSDP1 shows gradients when the backward pass is over; use FSDP2")
        if self.accumulation > 1:
            raise ConfigError(
                f"release_gradients=True: gradients cannot be accumulated over {self.accumulation} micro-batches; take "
                "one, with checkpointing if the activations do not fit"
            )

    def is_low_rank(self, parameter: Parameter) -> bool:
        """Whether our optimizer keeps low-rank momenta for it."""
        return self.takes(parameter.name, parameter.shape)

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this name and shape, or a matrix of a stack, is low-rank."""
        ours = self.optimizer
        key = (name, shape)
        if key not in self._taken:
            found = is_low_rank(name, shape, ours.rank, ours.resolved_rank_v, ours.target_modules)
            self._taken[key] = found
        return self._taken[key]

    @functools.cached_property
    def _taken(self) -> dict[tuple[str, tuple[int, ...]], bool]:
        return {}

    @property
    def sharing(self) -> int:
        """Ranks that share the parameters: all of them, or those of one group under hybrid sharding."""
        return min(self.shard_size, self.world_size) if self.layout == "hsdp" else self.world_size

    def wrapped(self) -> dict[str, list[Parameter]]:
        """Parameters by the module that FSDP wraps: each layer, and under "" the rest of the model."""
        found: dict[str, list[Parameter]] = {}
        for p in self.parameters:
            layer = re.match(r".*?\.\d+(?=\.)", p.name)
            found.setdefault(layer.group() if layer else "", []).append(p)
        return found

    def kept_as(self, name: str, shape: tuple[int, ...]) -> LowRankConfig | None:
        """By which settings the state of a parameter is a matrix's; None where it is AdamW's."""
        if self.takes(name, shape):
            return self.optimizer
        return others.settings(name, shape, self.optimizer, {})

    def stepped_as(self, share: Share) -> LowRankConfig | None:
        """By which settings a parameter is stepped as a matrix; None where it is AdamW's."""
        return self.kept_as(share.name, share.shape) if len(share.shape) == 2 else None

    @property
    def in_units(self) -> bool:
        """Whether gradients are complete by the unit that FSDP2 wraps."""
        return self.layout in ("fsdp2", "hsdp")

    @property
    def device(self) -> str:
        """The kind of device that steps."""
        return "cpu" if self.cpu or self.offload else "cuda"

    @property
    def matrices(self) -> int:
        """Number of low-rank matrices, those in stacks included."""
        return sum(p.shape[0] if len(p.shape) == 3 else 1 for p in self.parameters if self.is_low_rank(p))

    @property
    def low_rank_elements(self) -> int:
        """Elements of the low-rank matrices."""
        return sum(p.numel for p in self.parameters if self.is_low_rank(p))

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def width(self) -> int:
        """Bytes of an element in the precision of the model's computation."""
        return BYTES[self.precision]

    @property
    def stepped(self) -> int:
        """Bytes of an element of the weights that the optimizer steps: of fp32 masters, or of bf16 ones without."""
        return 2 if self.optimizer.weights in SIXTEEN else FP32

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are computed with in fewer bits under autocast; elsewhere there are copies of them."""
        return self.layout in ("ddp", "tp") and self.width < self.stepped
