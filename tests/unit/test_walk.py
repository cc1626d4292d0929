"""The way of a gradient through the package: which rooms a step enters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lorapre_dist
from lorapre_dist import LoRAPre
from lorapre_dist.config import ConfigError
from tests.oracle import STEPS

ROOT = Path(lorapre_dist.__file__).parent
OPTIMIZERS = sorted(kind.optimizer for kind in STEPS)


def walk(optimizer) -> list[str]:
    """The files of the package whose functions are called in a step, one after the other."""
    found = []

    def see(frame, event, _):
        code = frame.f_code
        # Muon's learning rate depends on a matrix's shape, and is asked for by it.
        if event == "call" and Path(code.co_filename).is_relative_to(ROOT) and code.co_name != "adjusted_lr":
            found.append(str(Path(code.co_filename).relative_to(ROOT)))

    sys.setprofile(see)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return found


def stepped(name: str, **options):
    """An optimizer of one matrix and one vector that has taken two steps, with gradients for the next."""
    parameters = {"layers.0.q_proj.weight": nn.Parameter(torch.randn(24, 16)), "norm": nn.Parameter(torch.ones(16))}
    optimizer = getattr(lorapre_dist, name)(parameters.items(), lr=1e-3, rank=4, **options)
    for step in range(3):
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        if step < 2:
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_enters_three_rooms(name):
    """Settings are read and validated when they change: a step that changes none does not go there."""
    assert {file.split("/")[0] for file in walk(stepped(name))} == {"optimizers", "layouts", "core"}


def test_settings_that_change_are_validated():
    optimizer = stepped("LoRAPre")
    group = optimizer.param_groups[0]
    group["betas"] = (0, 0.99)
    optimizer.step()  # after which (False, 0.99) is equal to what has been validated
    for key, bad in (("lr", -1.0), ("scale", -1.0), ("rank", 4.0), ("betas", (0.9, 2)), ("betas", (False, 0.99))):
        good, group[key] = group[key], bad
        with pytest.raises(ConfigError, match=key):
            optimizer.step()
        group[key] = good
    group["lr"] = 0.00123456789  # which nothing else has had validated in this process
    assert any(file.startswith("config/") for file in walk(optimizer))
    group["betas"] = [0.9, 0.99]  # a list cannot be looked up
    optimizer.step()


def test_a_group_of_lists_is_as_one_of_tuples():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    one, other = (LoRAPre([{"params": [x], "betas": b}], lr=0.1, rank=4) for x, b in ((p, [0.8, 0.9]), (q, (0.8, 0.9))))
    for x, optimizer in ((p, one), (q, other)):
        torch.manual_seed(1)
        for _ in range(2):
            x.grad = torch.randn_like(x)
            optimizer.step()
    assert torch.equal(p, q)
