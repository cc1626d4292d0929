"""What DeepSpeed, FSDP or DDP itself holds and sends: weights, gradients, buffers, and the collectives of a step.

Written from the sources of DeepSpeed 0.19 and PyTorch 2.13. ``e`` is the bytes of an element in the precision of the
model's computation, ``P`` the model's elements, ``N`` the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from lorapre_dist.layouts.geometry.shares import Arrangement

from . import axes
from .activations import INSTANTS
from .arrange import arranged
from .request import FP32, Parameter, Request
from .rivals import Array, numel, over_ranks, zeros

# DeepSpeed's ZeRO-0 all-reduces gradients by this many elements (runtime/engine.py, buffered_allreduce_fallback).
ZERO0_BUCKET = 500_000_000
FP64 = 8


@dataclass
class Frame:
    """Bytes on each rank (arrays over :attr:`Arrangement.size`, or numbers that are the same on all).

    Attributes:
        weights: and fp32 masters.
        gradients: in the step, at most.
        buffers: for collectives, and whole parameters gathered for computation, in forward and backward, at most.
        backward: gradients at the end of the backward pass.
        left: of the buffers, what is there in the step.
        norm: gradients as the step begins, where their norm is taken in fp64; 0: there is no such copy.
        during: buffers at some instants (:data:`lorapre_dist.planner.activations.INSTANTS`), where they are fewer.
        late: elements whose gradients are whole in the buffers at an instant, and reduced later.
        flat: gradients are parts of one buffer, which is there all the time.
        host: in host memory under offload: master weights and gradients.
        sent: by purpose, in a step and a ring implementation.
    """

    weights: Any
    gradients: Any
    buffers: Any
    backward: Any = None
    left: Any = 0
    norm: Any = 0
    during: dict[str, Any] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    flat: bool = False
    host: Any = 0
    sent: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backward is None:
            self.backward = self.gradients

    def repeated(self, times: int) -> Frame:
        """The same of so many ranks in the place of each."""
        several = {name: value for name, value in vars(self).items() if name not in ("during", "late", "flat", "sent")}
        found: dict[str, Any] = {
            name: np.repeat(value, times) if np.ndim(value) else value for name, value in several.items()
        }
        during = {name: np.repeat(value, times) if np.ndim(value) else value for name, value in self.during.items()}
        return replace(self, **found, during=during)


def frame(request: Request, arrangement: Arrangement) -> Frame:
    """The frame of the request's layout, and what its further axes send.

    Tensor-parallel ranks each have the frame of their own parts: that of the first one, which has most.
    """
    make: dict[str, Callable[[Request, Arrangement], Frame]] = {
        "zero0": _zero0,
        "zero1": _zero12,
        "zero2": _zero12,
        "zero3": _zero3,
        "fsdp1": _fsdp1,
        "fsdp2": _fsdp2,
        "hsdp": _fsdp2,
        "tp": _tp,
        "ddp": _ddp,
    }
    one = request.local
    found = make[request.layout](one, arrangement if one is request else arranged(one))
    return replace(found.repeated(request.tensor), sent=found.sent | axes.sent(request))


def plain(request: Request) -> Frame:
    """DDP on weights in the compute precision, without masters, as ``galore-torch`` is run."""
    size = request.width * request.elements
    return Frame(size, size, size, sent=_all_reduce(request, size))


def _zero0(request: Request, _: Arrangement) -> Frame:
    """Whole weights, with fp32 masters below fp32; there the step makes fp32 copies of the gradients."""
    e, elements = request.width, request.elements
    masters = 0 if e == FP32 else FP32
    buffers = e * min(elements, ZERO0_BUCKET) if request.world_size > 1 else 0
    return Frame((e + masters) * elements, (e + masters) * elements, buffers, sent=_all_reduce(request, e * elements))


def _zero12(request: Request, arrangement: Arrangement) -> Frame:
    """Whole weights in one flat buffer, masters and reduced gradients of one partition.

    As the step begins the norm of each gradient is taken in fp64, of a copy. Then the reduced gradients, a flat copy of
    them and its fp32 form exist together: 8 bytes an element of the partition, whatever the precision; 4 where the
    masters are bf16 (``bf16_master_weights_and_grads``). ZeRO-1 keeps whole gradients to the end of the backward pass
    (``reduce_gradients``), and then allocates the partition into which it moves its part; ZeRO-2 reduces each gradient
    when it is there. The reduction is an all-reduce of each bucket unless ``use_multi_rank_bucket_allreduce`` is off.
    """
    e, m, part, size = request.width, request.stepped, _partition(arrangement), request.world_size
    zero, weights = request.zero, e * part * size + m * part
    gradients, backward = (2 * e + (m if m != e else 0)) * part, e * part
    buckets = (2 if zero.overlap_comm else 1) if zero.contiguous_gradients else 0
    buffers, host, kept = e * buckets * zero.reduce_bucket_size, 0 * part, request.layout == "zero1"
    largest, during = max(p.numel for p in request.parameters), dict[str, Any]()
    if kept:
        moved = buffers + e * np.maximum(part, largest)
        during = dict.fromkeys(INSTANTS, moved if zero.overlap_comm else buffers) | {"end": moved}
        backward = np.full_like(part, e * request.elements)
    if kept and request.accumulation > 1:
        gradients = np.maximum(gradients, e * request.elements)
    if largest > zero.reduce_bucket_size:  # it goes by itself, from a copy
        buffers += 2 * e * largest
    if request.offload:
        host = (2 * m + e) * part + e * largest
        weights = e * part * size
        gradients = np.full_like(part, e * (request.elements if kept and request.accumulation > 1 else largest))
        backward = gradients
    passes = 1 if kept else request.accumulation
    weights_sent = e * int(part[0]) * size
    if request.world_size > 1 and zero.use_multi_rank_bucket_allreduce:
        sent = _all_reduce(request, passes * e * request.elements)
        sent["all-gather weights"] = _sharded(request, 0, weights_sent)["all-gather weights"]
    else:
        sent = _sharded(request, passes * e * request.elements, weights_sent)
    norm = 0 * part if request.offload else e * part + FP64 * np.minimum(part, largest)
    during |= {"gather": 0, "forward": 0}
    return Frame(weights, gradients, buffers, backward, norm=norm, during=during, host=host, sent=sent)


def _zero3(request: Request, arrangement: Arrangement) -> Frame:
    """Weights, masters and gradients of one partition; at the step, fp32 gradients of one sub-group at a time.

    Weights gathered for computation are bounded by ``stage3_max_live_parameters``, and assumed to be used again within
    ``stage3_max_reuse_distance``. They are counted as gathered forward
    and backward for each micro-batch; what DeepSpeed keeps in between (all of a model that fits in its prefetch bucket)
    goes once, and a tied parameter once more for each use.
    """
    e, m, part, size = request.width, request.stepped, _partition(arrangement), request.world_size
    zero, weights, step = request.zero, (e + m) * part, (m + (e if e != m else 0)) * arrangement.call_elements
    backward, gradients, host = e * part, e * part + step, 0 * part
    gathered = min(request.elements, zero.max_live_parameters) if size > 1 else 0
    bucket = e * zero.reduce_bucket_size if zero.contiguous_gradients else 0
    if request.offload:
        host, weights, backward, gradients = (2 * m + e) * part, e * part, 0 * part, 0 * part
    padded, passes = int(part[0]) * size, request.accumulation
    sent = _sharded(request, e * passes * padded, 2 * e * passes * padded)
    # What is prefetched together is put together from a buffer with the parts of all ranks, and a gradient's part cast
    # for the norm. From the forward to the backward pass weights stay gathered, and are let go of when their gradients
    # are there, whole and once more to be reduced.
    largest, during = max(p.numel for p in request.parameters), dict[str, Any]()
    norm = 0 * part if request.offload else e * part + FP64 * -(-largest // size)
    if size > 1:
        ahead = max(largest, min(request.elements, zero.prefetch_bucket_size))
        again = ahead if request.elements > zero.max_live_parameters else 0
        layers = {name: sum(p.numel for p in some) for name, some in request.wrapped().items()}
        last = layers.pop("", 0) + max(layers.values(), default=0)
        numbers = {"loss": gathered + again, "top": gathered + again + 2 * largest}
        numbers |= dict.fromkeys(("bottom", "end"), min(gathered, last) + again + 2 * largest)
        during = {name: e * number + bucket for name, number in numbers.items()}
        gathered += ahead
    buffers = e * gathered + bucket
    return Frame(weights, gradients, buffers, backward, bucket, norm, during, flat=True, host=host, sent=sent)


def _fsdp2(request: Request, arrangement: Arrangement) -> Frame:
    """Shards of weights and gradients, fp32 or bf16; computation gathers one layer while it prefetches the next.

    Assumes ``fully_shard`` on each layer and on the model and, below fp32, ``MixedPrecisionPolicy(param_dtype,
    reduce_dtype=torch.float32)``: whole weights and gradients of two layers and of the rest of the model in e bytes,
    and one unit's in fp32 on the way to the reduction. Layers are gathered forward and backward, the rest once.

    In a stage of a pipeline layers stay gathered from a backward to the next forward pass, and gradients whole until
    they are reduced after the last micro-batch: of M of them, 1F1B gathers layers M + 1 times.
    """
    e, n = request.width, request.sharing
    partition = _partition(arrangement)
    padded = np.full_like(partition, partition[0])
    wrapped, stacks = request.wrapped(), request.is_stack if request.expert > 1 else lambda _: False
    units = {name: sum(_slices(p.shape, n) for p in some if not stacks(p.shape)) for name, some in wrapped.items()}
    apart = {name: _apart(request, [p for p in some if stacks(p.shape)]) for name, some in wrapped.items()}
    rest, layers = units.pop("", 0), sum(units.values())
    largest = max((size + apart[name] for name, size in units.items()), default=0)
    passes, buffers = request.accumulation, 0
    during, late = dict[str, Any](), dict[str, Any]()
    if n > 1 or e < FP32:
        during, late = _gathered(request, rest, layers + sum(apart.values()), largest)
        buffers = max(during.values())
    if request.part is not None and request.part.stages > 1:
        whole = (e + (FP32 if passes > 1 else e)) * (rest + layers)
        during, late = {name: max(size, whole) for name, size in during.items()}, {}
        buffers = max(during.values(), default=0)
        sent = _sharded(request, FP32 * (rest + layers), e * (rest + (passes + 1) * layers))
    else:
        sent = _sharded(request, FP32 * passes * (rest + layers), e * passes * (rest + 2 * layers))
    if request.expert > 1:
        part = passes * sum(apart.values())
        for purpose, more in _rings(request.world_size // request.expert, FP32 * part, 2 * e * part).items():
            sent[purpose] = sent.get(purpose, 0) + more
    copies = request.world_size // n
    if copies > 1:  # hybrid: each shard of the gradients is summed over the groups
        sent["all-reduce gradients"] = round(2 * (copies - 1) / copies * FP32 * passes * (rest + layers) / n)
    shards = request.stepped * padded
    if request.offload:
        return Frame(0 * padded, 0 * padded, buffers, during=during, host=2 * shards, sent=sent)
    return Frame(shards, shards, buffers, during=during, late=late, sent=sent)


def _apart(request: Request, stacks: list[Parameter]) -> int:
    """Elements of the experts of a layer that one expert-parallel rank has, padded for the ranks that share these."""
    shapes = [(p.shape[0] // request.expert, *p.shape[1:]) for p in stacks]
    return sum(_slices(shape, request.world_size // request.expert) for shape in shapes)


def _gathered(request: Request, rest: int, layers: int, largest: int) -> tuple[dict[str, int], dict[str, int]]:
    """Of FSDP2: buffers at each instant, and elements whose gradients are whole in them.

    What is in no layer is gathered from the forward pass to the end of the backward pass, and all of its gradients are
    reduced then: in fp32, from a copy, into shards that are rounded to the type of the weights. A layer's result waits
    until the next reduction. What has been gathered is copied to parameters, and stays beside them until what is
    gathered next has been (``FSDPParamGroup.wait_for_unshard``).
    """
    e, n, first = request.width, request.sharing, request.parameters[0]
    embedding = first.numel if first in request.wrapped().get("", ()) else 0
    head, two = max(0, rest - embedding), min(layers, 2 * largest)
    bottom, top = e * (rest + head + largest) + FP32 * largest, e * (rest + head + two)
    rounded = (FP32 + request.stepped) * rest // n if request.stepped < FP32 else 0  # shards, before and after it
    end = (2 * e + FP32) * rest + FP32 * largest // n + rounded
    computing = e * (rest + largest)
    gathering = e * (2 * rest + largest if n > 1 else rest)
    during = {"gather": gathering, "forward": computing, "loss": computing, "top": top, "bottom": bottom, "end": end}
    return during, {"top": head, "bottom": head, "end": rest}


def _slices(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of a parameter whose slices of dim 0 are padded to equally many on each rank."""
    rows = max(1, shape[0] if shape else 1)
    return -(-rows // ranks) * ranks * (prod(shape) // rows)


def _fsdp1(request: Request, arrangement: Arrangement) -> Frame:
    """Shards of flat parameters and of gradients, fp32 or bf16; one layer is gathered while the next is prefetched.

    Assumes ``FullyShardedDataParallel(use_orig_params=True)``, full shards, of each layer and of the model, and below
    fp32 ``MixedPrecision(param_dtype, reduce_dtype=torch.float32)``. On one rank nothing is sharded.
    """
    e, m, n = request.width, request.stepped, request.sharing
    if n == 1:
        return Frame(m * request.elements, m * request.elements, 0 if e == m else e * request.elements)
    units = {name: sum(p.numel for p in some) for name, some in request.wrapped().items()}
    rest, layers, largest = units.pop("", 0), sum(units.values()), max(units.values(), default=0)
    live, passes, whole = rest + min(layers, 2 * largest), request.accumulation, n * int(_partition(arrangement)[0])
    sent = _sharded(request, FP32 * passes * whole, e * passes * (2 * whole - rest))
    shards = m * _partition(arrangement)
    return Frame(shards, shards, 2 * e * live + FP32 * max(rest, largest), sent=sent)


def _tp(request: Request, arrangement: Arrangement) -> Frame:
    """Parts of split weights and gradients, all of the others. Activations are what is sent: that is left out."""
    held = sum((over_ranks(arrangement, s, numel(s)) for s in arrangement.shares), zeros(arrangement))
    e, m = request.width, request.stepped
    return Frame(m * held, m * held, 0 if e == m else e * int(held.max()))


def _ddp(request: Request, _: Arrangement) -> Frame:
    """fp32 weights (autocast below fp32), or bf16 ones, gradients, and DDP's buckets, another copy of the gradients."""
    size = request.stepped * request.elements
    buckets = size if request.world_size > 1 else 0
    return Frame(size, size, buckets, left=buckets, sent=_all_reduce(request, size))


def _all_reduce(request: Request, size: int) -> dict[str, int]:
    n = request.world_size
    return {"all-reduce gradients": round(2 * (n - 1) / n * size)} if n > 1 else {}


def _sharded(request: Request, gradients: int, weights: int) -> dict[str, int]:
    """Bytes of whole gradients and weights, as a rank sends them."""
    return _rings(request.sharing, gradients, weights)


def _rings(n: int, gradients: int, weights: int) -> dict[str, int]:
    ring = (n - 1) / n
    if n == 1:
        return {}
    return {"reduce-scatter gradients": round(ring * gradients), "all-gather weights": round(ring * weights)}


def _partition(arrangement: Arrangement) -> Array:
    return np.array(arrangement.partition, np.int64)


def full(value: Any, ranks: int) -> Array:
    """``value`` as an array over ranks."""
    return np.broadcast_to(np.asarray(value, np.int64), (ranks,))
