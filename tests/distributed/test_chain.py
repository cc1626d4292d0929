"""Training goes on from one kind of hybrid parallelism to another, by way of ZeRO-3 and of one process."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

import lorapre_dist
from lorapre_dist import checkpoint
from lorapre_dist.optimizers import OPTIMIZERS
from tests.covering import some

from .harness import run_ranks
from .native_cases import OPTIONS, Net, backward, batch_of, dense_path, full_parameters, wrapped

CHAIN = [("pp+fsdp2", 4), ("zero3", 3), ("tp+fsdp2", 4), ("one device", 1), ("ep+fsdp2 2", 4), ("tp+pp+fsdp2", 8)]
CHAIN += [("ep+fsdp2 1", 4), ("pp", 2), ("ep+fsdp2 0", 4)]
STEPS = 2


def chain_case(rank: int, world_size: int, *, layout: str, optimizer: str, folder: str, leg: int) -> tuple[float, str]:
    """Go on from the leg before, save; the distance to the reference that never stopped."""
    run = _engine_leg if layout == "zero3" else _native_leg
    got = run(layout, world_size, optimizer, folder, leg)
    want = dense_path(STEPS * (leg + 1), optimizer, OPTIONS[optimizer])
    assert got.keys() == want.keys()
    return max((float((got[n].double() - want[n]).norm() / want[n].norm()), n) for n in want)


def _native_leg(layout: str, world_size: int, optimizer: str, folder: str, leg: int) -> dict[str, torch.Tensor]:
    model = Net() if layout == "one device" else wrapped(layout, Net(), world_size)
    stepper = OPTIMIZERS[optimizer](model.named_parameters(), **OPTIONS[optimizer])
    if leg:
        assert checkpoint.load(model, stepper, folder, f"leg{leg - 1}") == {"leg": leg - 1}
        assert {bound.state.step for bound in stepper.bound()} == {leg * STEPS}
    for step in range(leg * STEPS, (leg + 1) * STEPS):
        stepper.zero_grad()
        backward(model, batch_of(step, torch.float32))
        stepper.step()
    checkpoint.save(model, stepper, folder, f"leg{leg}", extra={"leg": leg})
    return full_parameters(layout, model)


def _engine_leg(layout: str, world_size: int, optimizer: str, folder: str, leg: int) -> dict[str, torch.Tensor]:
    zero = {"stage": 3, "sub_group_size": 400, "stage3_param_persistence_threshold": 10}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": optimizer, "params": OPTIONS[optimizer]},
        "zero_optimization": zero,
    }
    engine = lorapre_dist.initialize(model=Net(), config=config)[0]
    try:
        _, client = engine.load_checkpoint(folder, f"leg{leg - 1}")
        assert client == {"leg": leg - 1}
        for step in range(leg * STEPS, (leg + 1) * STEPS):
            engine.backward(engine(batch_of(step, torch.float32)))
            engine.step()
        engine.save_checkpoint(folder, f"leg{leg}", client_state={"leg": leg})
        named = list(engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters([p for _, p in named]):
            return {n: p.detach().clone() for n, p in named}
    finally:
        engine.destroy()
        dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, legs", some([("LoRAPre", 9), ("LoRAPreAdafactor", 5)], [("LoRAPre", 9)]))
def test_training_goes_on_under_other_parallelism(optimizer, legs, tmp_path):
    """fp32, since an engine is among them: rounding alone leaves 1e-6."""
    for leg, (layout, world) in enumerate(CHAIN[:legs]):
        arguments = {"layout": layout, "optimizer": optimizer, "folder": str(tmp_path), "leg": leg}
        for error, name in run_ranks(world, chain_case, **arguments):
            assert error <= 1e-5, (leg, layout, world, name, error)
