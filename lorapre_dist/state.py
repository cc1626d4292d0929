"""``state_dict`` of one rank: tensors by parameter name, and plain numbers that say what they belong to.

    {"format": 1,
     "state": {name: {"kind": "lorapre" | "adamw", "optimizer": "LoRAPre", "shape": [p, q], "interval": [start, stop],
                      "columns": n, "step": int, "tensors": {"m_B": ..., ...}}},
     "param_groups": [{"lr": ..., ..., "params": [0, 1, ...]}]}

It holds tensors, numbers, strings, lists and dicts only, so ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import ConfigError
from .core.factors import Matrix

FORMAT = 1
_SHAPING = ("rank", "rank_v", "variant", "target_modules")


def save_state(held: list[tuple[Any, Any]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of this rank's pieces; the tensors are not copied."""
    state = {piece.name: {**_identity(piece, s), "step": s.step, "tensors": s.tensors()} for piece, s in held}
    packed, count = plain_groups(groups), 0
    for options, group in zip(packed, groups, strict=True):
        options["params"] = list(range(count, count + len(group["params"])))
        count += len(group["params"])
    return {"format": FORMAT, "state": state, "param_groups": packed}


def plain_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The options of parameter groups in lists, numbers and strings."""
    return [{k: _plain(v) for k, v in group.items() if k not in ("params", "param_names")} for group in groups]


def restore_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Set the options of parameter groups to what :func:`plain_groups` gave; each keeps its type."""
    for group, options in zip(groups, saved, strict=True):
        group.update({k: _like(v, group.get(k)) for k, v in options.items() if k != "params"})


def load_state(saved: dict[str, Any], held: list[tuple[Any, Any]], groups: list[dict[str, Any]]) -> None:
    """Copy ``saved`` into the state of this rank's pieces and the groups' settings.

    Raises:
        ConfigError: what differs, in one line; nothing has been changed then.
    """
    if saved.get("format") != FORMAT:
        raise ConfigError(f"optimizer state of format {saved.get('format')!r}: this version reads format {FORMAT}")
    differences = _differences(saved, held, groups)
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ConfigError("the optimizer state does not fit: " + "; ".join(differences[:3]) + more)
    for piece, state in held:
        entry = saved["state"][piece.name]
        state.step = entry["step"]
        for name, tensor in state.tensors().items():
            tensor.copy_(entry["tensors"][name])
    restore_groups(groups, saved["param_groups"])


def _identity(piece: Any, state: Any) -> dict[str, Any]:
    matrix = isinstance(state, Matrix)
    return {
        "kind": "lorapre" if matrix else "adamw",
        "optimizer": state.optimizer if matrix else "AdamW",
        "shape": list(piece.shape),
        "interval": [piece.start, piece.stop, *(piece.columns or ())],
        "columns": state.factors["m"].At.shape[0] if matrix else 0,
    }


def _differences(saved: dict[str, Any], held: list[tuple[Any, Any]], groups: list[dict[str, Any]]) -> list[str]:
    found = []
    if len(saved["param_groups"]) != len(groups):
        found.append(f"{len(saved['param_groups'])} parameter groups were saved, there are {len(groups)}")
    for i, (group, options) in enumerate(zip(groups, saved["param_groups"], strict=False)):
        for key in _SHAPING:
            if key in options and options[key] != _plain(group.get(key)):
                found.append(f"group {i}: {key} was {options[key]!r}, is {group.get(key)!r}")
    missing = [piece.name for piece, _ in held if piece.name not in saved["state"]]
    extra = sorted(set(saved["state"]) - {piece.name for piece, _ in held})
    found += [f"{name}: not in the saved state" for name in missing]
    found += [f"{name}: saved, but not a parameter here" for name in extra]
    for piece, state in held:
        entry = saved["state"].get(piece.name)
        if entry is None:
            continue
        for key, value in _identity(piece, state).items():
            if entry.get(key) != value:
                found.append(f"{piece.name}: {key} was {entry.get(key)}, is {value}")
        for name, tensor in state.tensors().items():
            other = entry["tensors"].get(name)
            if other is None or other.shape != tensor.shape:
                was = "missing" if other is None else f"of shape {tuple(other.shape)}"
                found.append(f"{piece.name}: {name} was {was}, is of shape {tuple(tensor.shape)}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(value: Any, present: Any) -> Any:
    """A saved setting in the type of the present one."""
    if isinstance(value, list) and isinstance(present, tuple):
        return tuple(value)
    return torch.full_like(present, value) if isinstance(present, Tensor) else value
