"""Whatever the constructors are given: an optimizer that steps, or one line about it."""

from __future__ import annotations

import inspect
import json
import math
import random
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorapre_dist.config import ConfigError
from lorapre_dist.config.checks import LARGEST, SMALLEST
from lorapre_dist.optimizers import OPTIMIZERS

VALUES: list[Any] = [
    *(0, 0.0, -0.0, 1, -1, 2, 3, 7, 99, 0.5, 0.999999999, 1e-3, 1e-19, 1e-30, 1e18, SMALLEST, LARGEST),
    *(1e-300, 1e-45, 5e-324, 1e30, 1e38, 1e39, 1e300, math.inf, -math.inf, math.nan),
    *(2**31, 2**63, 2**64, 10**400, -(10**400), 10**5000),
    *(None, True, False, "", "nan", "1e-3", "auto", "stable", "paper", "original", "match_rms_adamw"),
    *("*", "(", ".*", "q_proj", "x" * 9999, "a{99999999999999999999}", "(" * 3000, chr(10), chr(0)),
    *([], (), {}, [0.9], (0.9, 0.999), [0.9, 0.99, 0.999], (0.0, 0.0), (1.0, 1.0), ("a", "b"), [None, None]),
    *((SMALLEST, 1), [3.0, -4.0, 2.0], (1e300,) * 3, ["q_proj", "w"], ["("], [""], range(3), set(), frozenset("q")),
    *(b"1", object(), int, print, 1j, torch.tensor(0.1), torch.tensor([1.0, 2.0]), torch.tensor(math.nan)),
    *(np.float32(0.1), np.float64(0.1), np.int64(3), np.array([0.9, 0.99]), np.array(["stable", "paper"])),
    *(torch.zeros(30, 30), (x for x in ())),
]
NAMES: list[Any] = ["q_proj", "", "a.b", "w[3]", chr(10), "ä", 5, None, ("q_proj",), b"q_proj", 1.5, True, "module."]
#: Words of errors that nobody has written for the user.
PYTHONS = ("object is not", "has no attribute", "unsupported operand", "not supported between", "positional argument")
SHAPES = [(), (0,), (0, 9), (9, 0), (1, 1), (2, 9, 8), (0, 9, 9), (1,) * 9]
TYPES = [torch.complex64, torch.int64, torch.bool, torch.bfloat16, torch.half]


def _matrix(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (9, 7)) -> nn.Parameter:
    tensor = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(dtype)
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())


def _parameters(draw: random.Random) -> Any:
    """What to give as ``params``: mostly right."""
    named: list[Any] = [("q_proj.weight", _matrix()), ("bias", _matrix(shape=(5,)))]
    kind = draw.randrange(12)
    if kind == 0:
        named[draw.randrange(2)] = (draw.choice(NAMES), _matrix())
    elif kind == 1:
        return draw.choice(VALUES)
    elif kind == 2:
        named[1] = draw.choice([*VALUES, _matrix(), ("x", None), ("x", 3), (), ("x", _matrix(), 1)])
    elif kind == 3:
        named[1] = ("k_proj", _matrix(draw.choice(TYPES)))
    elif kind == 4:
        named[1] = ("k_proj", _matrix(shape=draw.choice(SHAPES)))
    elif kind == 5:
        # Bare tensors, to which a group may give names.
        return draw.choice([[p for _, p in named], named[0][1], named[0], [named], dict(named), iter(named), []])
    return named


def _groups(draw: random.Random, options: list[str]) -> Any:
    params = _parameters(draw)
    if draw.randrange(3):
        return params
    group: dict[Any, Any] = {"params": params}
    for _ in range(draw.randrange(1, 3)):
        key = draw.choice([*options, "base_lr", "peak_lr", "param_names", "name", "parms", 3, None, "Rank"])
        group[key] = draw.choice(VALUES)
    if not draw.randrange(9):
        del group["params"]
    return draw.choice([group, [group], [group, {"params": [("late", _matrix())], "rank": 0}]])


def _case(seed: int) -> tuple[str, Any, dict[str, Any]]:
    draw = random.Random(seed)
    name = draw.choice(list(OPTIMIZERS))
    options = [f.name for f in fields(OPTIMIZERS[name].config_class)]
    right = [("q_proj.weight", _matrix()), ("bias", _matrix(shape=(5,)))]
    params = right if draw.randrange(3) else _groups(draw, options)
    given: dict[str, Any] = {"rank": 2, "lr": 0.01}
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        given[draw.choice([*options, "shard_state", "learning_rate", "fused", "Lr"])] = draw.choice(VALUES)
    return name, params, given


def _step(optimizer: Any) -> None:
    """Three steps with every gradient."""
    for _ in range(3):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p) * 0.5
        optimizer.step()
    json.dumps(optimizer.state_dict()["param_groups"], default=str)


def check(seed: int) -> str:
    """What a case ends with: an empty string, or the line."""
    name, params, given = _case(seed)
    try:
        optimizer = OPTIMIZERS[name](params, **given)
    except (ValueError, TypeError) as error:  # ConfigError is a ValueError
        line = str(error)
        assert line and "\n" not in line and len(line) < 1500, line
        assert not any(words in line for words in PYTHONS), line
        return line
    _step(optimizer)
    return ""


def test_whatever_a_constructor_is_given(exhaustive):
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3000 if exhaustive else 300):
            try:
                ends.append(check(seed))
            except Exception as error:
                raise AssertionError(f"seed {seed}: {_case(seed)}") from error
    taken = sum(not line for line in ends)
    assert 0.15 * len(ends) < taken < 0.8 * len(ends)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_constructor_shows_every_option_with_its_default(kind):
    """An editor and ``help()`` see what the settings know; a name that they do not know is still theirs to refuse."""
    shown = inspect.signature(OPTIMIZERS[kind]).parameters
    known = {field.name: field.default for field in fields(OPTIMIZERS[kind].config_class)}
    own = {"params", "shard_state", "unknown"}
    assert {name: one.default for name, one in shown.items() if name not in own} == known
    positional = [name for name, one in shown.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert positional[:2] == ["params", "lr"] and set(positional[2:]) <= {"betas", "momentum", "eps", "weight_decay"}
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        OPTIMIZERS[kind]([("q_proj", _matrix())], rnak=4)
