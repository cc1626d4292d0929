"""What runs on the ranks of the DeepSpeed tests of what a step keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lorapre_dist
from lorapre_dist import LoRAPre, checkpoint
from lorapre_dist.config import ConfigError
from lorapre_dist.core import codes
from lorapre_dist.core.quantized import widened
from lorapre_dist.core.spec import SCALES

from . import cases

STEPS = 5


def kept_case(rank: int, world_size: int, *, stage: int, options: list[dict[str, Any]], folder: str) -> list[Any]:
    """For each of some options: the largest distance of any parameter, and of any factor, to one device's.

    Then the engine's checkpoint is loaded by the optimizer of one device, and both take one step more: that distance.
    """
    found = []
    for k, some in enumerate(options):
        config = cases.ds_config(stage, "fp32", 1, 0.0, {"lr": 0.01, "rank": 3, **some})
        engine = cases.build(config)
        alone = cases.Net()
        optimizer = LoRAPre(alone, lr=0.01, rank=3, **some)
        train(engine, alone, optimizer, rank, world_size, range(STEPS))
        first = distance(engine, alone)
        states = lorapre_dist.deepspeed.base_optimizer(engine).full_state_dict(), optimizer.full_state_dict()
        engine.save_checkpoint(f"{folder}/{k}", "tag")
        loaded = cases.Net()
        resumed = LoRAPre(loaded, lr=0.01, rank=3, **some)
        checkpoint.load(loaded, resumed, Path(folder) / str(k))
        train(engine, loaded, resumed, rank, world_size, range(STEPS, STEPS + 1))
        found.append((first, differing(*states) if rank == 0 else 0.0, distance(engine, loaded)))
        engine.destroy()
    return found


def train(engine: Any, alone: Any, optimizer: Any, rank: int, world_size: int, steps: range) -> None:
    cases.train(engine, rank, world_size, steps, 1)
    for step in steps:
        gradients = cases.mean_gradients(step, world_size, 1)
        for name, p in alone.named_parameters():
            p.grad = gradients[name].float() if name in gradients else None
        optimizer.step()


def distance(engine: Any, alone: Any) -> float:
    ours = cases.full_parameters(engine)
    named = {n: p.detach() for n, p in alone.named_parameters() if p.requires_grad}
    return max(float((ours[n].double() - p.double()).norm() / p.double().norm()) for n, p in named.items())


def differing(ours: dict[str, Any], alone: dict[str, Any]) -> float:
    """The largest distance of any factor, and of any of AdamW's moments in 8 bits."""
    found = [0.0]
    for name, entry in alone.items():
        assert ours[name].keys() == entry.keys()
        for scale, key in SCALES.items() if SCALES.keys() <= entry.keys() else ():
            a, b = (codes.decoded(held[name][key], held[name][scale][:, None]) for held in (ours, alone))
            found.append(float((a - b).norm() / b.norm()))
        for key in entry.keys() & {"m_A", "m_B", "v_A", "v_B"}:
            assert ours[name][key].dtype == entry[key].dtype
            dim = -1 if key.endswith("_B") else -2
            a, b = (widened(held[name][key], dim, torch.float64) for held in (ours, alone))
            found.append(float((a - b).norm() / b.norm()))
    return max(found)


def refused_case(rank: int, world_size: int) -> list[str]:
    """Through both doors, and with an optimizer of one's own."""
    said = []
    config = cases.ds_config(2, "fp32", 1, 0.0, {"lr": 0.01, "rank": 3, "release_gradients": True})
    for door in ("lorapre", "deepspeed"):
        try:
            cases.build(config, door)
        except ConfigError as error:
            said.append(str(error))
    model = cases.Net()
    own = LoRAPre(model, rank=3, release_gradients=True)
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    try:
        lorapre_dist.initialize(model=model, optimizer=own, config=config)
    except ConfigError as error:
        said.append(str(error))
    return said
