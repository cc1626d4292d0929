"""What DeepSpeed 0.19 gets wrong around an optimizer, put right on the one engine that LoRAPre is bound to.

AdamW forgives all of it (it does not care about a gradient's scale), and so it may go unnoticed; here it would break
"every layout gives the single-process result". The tests of ``tests/deepspeed`` fail without these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...core.comm import Comm


def forget_gradients(zero: Any) -> None:
    """Make ZeRO-3, and ZeRO-1/2 with optimizer offload, start every step from zero gradients.

    There DeepSpeed overwrites a parameter's gradient buffer when a new gradient comes and never clears it, so a
    parameter that gets none is stepped with that of an earlier step, be it one that overflowed. Elsewhere it is
    stepped with zeros, and so it is with this.
    """

    def clear() -> None:
        if hasattr(zero, "grad_partitions_flat_buffer"):  # ZeRO-3
            zero.grad_partitions_flat_buffer.zero_()
        if getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False):
            stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
            for flat in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
                if flat.grad is not None:
                    flat.grad.zero_()
            for buffer in getattr(zero, "accumulated_grads_in_cpu", {}).values():
                buffer.zero_()

    _after_step(zero, clear)


def grow_loss_scale_after_step(wrapper: Any) -> None:
    """Let a dynamic loss scale grow after the step whose gradients were scaled with the old one.

    DeepSpeed grows it first and then divides by it: the gradient of such a step comes out halved.
    """
    update = wrapper._update_scale
    pending: list[bool] = []

    def defer_growth(overflow: bool = False) -> None:
        if overflow:
            update(overflow)
        else:
            pending.append(True)

    def grow() -> None:
        if pending:
            pending.clear()
            update(False)

    wrapper._update_scale = defer_growth
    _after_step(wrapper, grow)


def scale_loss(engine: Any) -> None:
    """Scale the loss in ZeRO-0 with fp16, where DeepSpeed divides the gradients by a loss scale it never applied."""
    wrapper = engine.optimizer
    backward, scale = engine.backward, engine.scale

    @functools.wraps(backward)
    def scaled_backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
        factor = wrapper.loss_scale
        return backward(loss.float() * factor, *args, **kwargs) / factor

    @functools.wraps(scale)
    def scaled(loss: Any) -> Any:
        return scale(loss.float() * wrapper.loss_scale)

    engine.backward, engine.scale = scaled_backward, scaled


def clip_by_all_stages(engine: Any, beyond: list[Any], counts: Callable[[Any], bool]) -> None:
    """Clip in ZeRO-0 with fp32 by the norm of all stages' gradients; DeepSpeed takes that of the first stage's alone.

    Args:
        beyond: groups of the ranks that hold the other parameters.
        counts: whether this rank is the one of those that counts a parameter.
    """

    def clip() -> None:
        comm = Comm()  # no part of a step
        own = [p for p in engine.module.parameters() if p.grad is not None]
        norms = [p.grad.norm(dtype=torch.float64) for p in own if counts(p)]
        total = torch.stack([torch.zeros((), dtype=torch.float64, device=engine.device), *norms]).square().sum()
        for group in beyond:
            comm.all_reduce(total, group, "gradient norm")()
        engine._global_grad_norm = norm = total.sqrt()
        factor = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
        for p in own:
            p.grad.mul_(factor.to(p.grad.dtype))

    engine.clip_fp32_gradients = clip


def skip_non_finite(wrapper: Any, optimizer: Any, names: dict[Any, str], searching: bool) -> None:
    """Let no step with a gradient that is not finite reach the optimizer, and tell it of those that are skipped.

    DeepSpeed looks at gradients in fp16, under ZeRO-3 and in its BF16 optimizer, but under ZeRO-1 and 2 not in fp32,
    and not where ``check_grad_overflow`` is off.

    Args:
        names: of the trained parameters.
        searching: a dynamic loss scale skips steps to find its size, an end of which DeepSpeed makes itself.
    """
    if hasattr(wrapper, "check_grad_overflow"):
        wrapper.check_grad_overflow = True
    step = wrapper.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        last_chance = not searching and optimizer.skips.seen[1] + 1 >= optimizer.max_skipped
        suspects = list(_non_finite(wrapper, names)) if last_chance else []
        result = step(*args, **kwargs)
        optimizer.engine_stepped(skipped=bool(wrapper.overflow), names=suspects, searching=searching)
        return result

    wrapper.step = watched


def _non_finite(zero: Any, names: dict[Any, str]) -> Iterator[str]:
    """Names of the parameters with a gradient on this rank that is not finite, before DeepSpeed drops it."""
    stage3 = hasattr(zero, "fp16_partitioned_groups_flat")
    groups = zero.fp16_groups if stage3 else getattr(zero, "params_in_partition", [])
    gradients = getattr(zero, "averaged_gradients", {})
    for i, group in enumerate(groups):
        for p, grad in zip(group, gradients.get(i) or [], strict=False):
            if grad is not None and not grad.isfinite().all():
                yield names[p]


def _after_step(wrapper: Any, then: Any) -> None:
    step = wrapper.step

    @functools.wraps(step)
    def step_and_then(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        then()
        return result

    wrapper.step = step_and_then
