"""What a resumed run has from its settings: the rules, on one device. The programs are in tests/launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lorapre_dist import ConfigError, LoRAPreMuon
from lorapre_dist.training.engines.schedule import scheduler_factory
from lorapre_dist.training.run import resumed
from lorapre_dist.training.run.app import _shown

OPTIMIZERS = {"ours": LoRAPreMuon, "torch's": torch.optim.AdamW}


@dataclass
class Engine:
    """What a training loop holds."""

    basic_optimizer: torch.optim.Optimizer
    lr_scheduler: Any


def engine(kind: str, params: dict[str, Any], steps: int, warmup: int) -> Engine:
    options = {"rank": 2, "target_modules": ["weight"]} if kind == "ours" else {}
    model = torch.nn.Linear(6, 5, bias=False)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer = OPTIMIZERS[kind](model.named_parameters(), **options, **params)
    return Engine(optimizer, scheduler_factory(warmup, steps)(optimizer))


def resume(kind: str, make_settings: Any, then: dict[str, Any], now: dict[str, Any], *flags: str) -> Any:
    """An engine that took three of ten steps with options ``then`` and goes on with ``now``, and what is said of it."""
    before = make_settings("--max_steps", "10", "--warmup_steps", "4")
    first = engine(kind, then, before.max_steps, before.warmup_steps)
    for _ in range(3):
        first.basic_optimizer.step()
        first.lr_scheduler.step()
    optimizer = {"type": "LoRAPreMuon" if kind == "ours" else "AdamW", "params": now}
    settings = make_settings("--max_steps", "10", "--warmup_steps", "4", *flags, ds={"optimizer": optimizer})
    second = engine(kind, now, settings.max_steps, settings.warmup_steps)
    wanted = resumed.options(second)
    second.basic_optimizer.load_state_dict(first.basic_optimizer.state_dict())
    second.lr_scheduler.load_state_dict(first.lr_scheduler.state_dict())
    lines = resumed.apply(second, settings, wanted, resumed.schedule(before))
    return first, second, lines


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_changes_where_nothing_was_changed(kind, make_settings):
    """To the last bit."""
    given = {"lr": 0.03, "weight_decay": 0.2}
    first, second, lines = resume(kind, make_settings, given, given)
    assert lines == []
    assert second.lr_scheduler.get_last_lr() == first.lr_scheduler.get_last_lr()
    assert resumed.options(second) == resumed.options(first)
    assert second.basic_optimizer.param_groups[0]["lr"] == first.basic_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_given_applies_and_what_is_not_stays(kind, make_settings):
    _, second, lines = resume(kind, make_settings, {"lr": 0.03, "weight_decay": 0.2}, {"lr": 0.01})
    group = second.basic_optimizer.param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (0.01, 0.2)
    assert group["lr"] == second.lr_scheduler.get_last_lr()[0] == 0.01 * 1.0  # the last step of the warm-up comes next
    kept = "kept       weight_decay 0.2 (the DeepSpeed JSON names none)"
    assert lines == ["changed    lr 0.03 -> 0.01", kept]
    second.lr_scheduler.step()
    assert group["lr"] <= 0.01
    if kind == "ours":  # adamw_lr goes by the new peak
        assert second.basic_optimizer.vector_hyper(second.basic_optimizer.group_config(group), group).lr <= 1e-3


def test_another_schedule_counts_from_the_next_step_on(make_settings):
    flags = ("--max_steps", "8", "--warmup_steps", "8")
    _, second, lines = resume("torch's", make_settings, {"lr": 0.03}, {"lr": 0.03}, *flags)
    assert second.basic_optimizer.param_groups[0]["lr"] == pytest.approx(0.03 * 4 / 8)
    assert lines == ["changed    max_steps 10 -> 8, warmup_steps 4 -> 8"]


@pytest.mark.parametrize("name, value", [("seed", 3), ("init_std", 0.5)])
def test_what_cannot_change_any_more_is_refused_by_name(name, value, make_settings):
    with pytest.raises(ConfigError, match=rf"cannot resume: {name} was .*, is {value}, and counts at the start"):
        resume("ours", make_settings, {"lr": 0.03}, {"lr": 0.03, name: value})


def test_a_loss_that_is_not_finite_is_no_number():
    assert _shown(None) == "unknown" and _shown(2.5) == "2.5000"
