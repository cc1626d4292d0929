"""What a resumed run has from its settings, and what from its checkpoint.

A checkpoint holds the options of the optimizer and where the schedule stands. What the DeepSpeed JSON or a flag gives
takes the place of what was saved; what they leave out stays as it was.
"""

from __future__ import annotations

from typing import Any

from lorapre_dist.config import ConfigError
from lorapre_dist.config.ds_training import clipping
from lorapre_dist.training.run.settings import RunSettings

Options = list[dict[str, Any]]

#: What shapes the state when it is made, and can change nothing afterwards but what ``--resize_rank`` adds.
AT_THE_START = ("seed", "init_std")


def schedule(settings: RunSettings) -> dict[str, Any]:
    """What a checkpoint notes of the settings beside the optimizer's, so that the next run can say what it changed."""
    return {
        "max_steps": settings.max_steps,
        "warmup_steps": settings.warmup_steps,
        "gradient_clipping": clipping(settings.ds_config),
    }


def options(engine: Any) -> Options:
    """The options of each parameter group; ``lr`` is that of the schedule's peak."""
    return [
        {"lr" if k == "initial_lr" else k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
        for group in engine.basic_optimizer.param_groups
    ]


def apply(engine: Any, settings: RunSettings, wanted: Options, noted: dict[str, Any]) -> list[str]:
    """After a load, give the engine what this run's settings name; what changed and what did not, a line each.

    Args:
        wanted: :func:`options` before the load.
        noted: :func:`schedule` of the run that saved.

    Raises:
        ConfigError: an option that cannot change any more.
    """
    given = set(settings.ds_config["optimizer"].get("params") or {})
    changed: dict[str, str] = {}
    kept: dict[str, str] = {}
    for group, saved, now in zip(engine.basic_optimizer.param_groups, options(engine), wanted, strict=True):
        for name in [n for n in now if n in saved and _plain(saved[n]) != _plain(now[n])]:
            if name not in given:
                if name != "base_lr":
                    kept[name] = f"{name} {_shown(saved[name])}"
                continue
            if name in AT_THE_START and not settings.resize_rank:
                was = f"{name} was {saved[name]!r}, is {now[name]!r}"
                raise ConfigError(f"cannot resume: {was}, and counts at the start of a run alone")
            changed[name] = f"{name} {_shown(saved[name])} -> {_shown(now[name])}"
            for key in ("initial_lr", "base_lr") if name == "lr" else (name,):
                if key in group:
                    group[key] = now[name]
    _reschedule(engine.lr_scheduler)
    if hasattr(engine, "optimizer") and hasattr(engine.optimizer, "clip_grad"):  # DeepSpeed's own loading restores it
        engine.optimizer.clip_grad = clipping(settings.ds_config)
    for name, value in schedule(settings).items():
        if name in noted and noted[name] != value:
            changed[name] = f"{name} {_shown(noted[name])} -> {_shown(value)}"
    lines = [f"changed    {', '.join(changed.values())}"] if changed else []
    return lines + ([f"kept       {', '.join(kept.values())} (the DeepSpeed JSON names none)"] if kept else [])


def _reschedule(scheduler: Any) -> None:
    """Set the lr of the next step by this run's schedule and the groups' peak."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, peak, fraction in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = peak * fraction(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(_plain(value))
