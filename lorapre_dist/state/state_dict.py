"""``state_dict`` in the form of ``torch.optim``, in every layout.

    {"state": {index: {"m_B": ..., "step": ...}},
     "param_groups": [{"lr": ..., "optimizer": "LoRAPre", "params": [0, 1, ...], "param_names": [...]}]}

The tensors are those of :mod:`lorapre_dist.state.dtensors`, which the functions of
``torch.distributed.checkpoint.state_dict`` and DCP understand. Some need another place: a stack of experts is many
matrices, and under DeepSpeed a stepped tensor holds parts of many parameters, so there it is
``{index: {name: {"m_B": ...}}}``; FSDP1 takes tensors of the parameter's shape only, so there they are in
``param_groups[i]["state"][name]``, which it leaves alone.

All of it is tensors, numbers, strings, lists and dicts, so ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config import ConfigError
from ..config.param_groups import clean_name, parameter_name
from ..core.comm import all_ranks
from ..core.rounding import COMPENSATION
from ..core.spec import SCALES
from ..layouts.base import Layout, Unit, local
from ..layouts.matrices import expert_name
from .dtensors import Exposed, Uneven, elsewhere, expose
from .full import recoded, rooted, said

_SHAPING = ("rank", "rank_v", "variant")
_OURS = ("params", "param_names", "state", "optimizer", "frozen")
# What was low-rank then has been compared, parameter by parameter; how it was selected is the present program's, and so
# are when gradients are used, how weights are kept (whose type a checkpoint does not change), what changes memory and
# time but numbers by rounding alone, and the form in which state is kept: what was saved in another one is converted.
_PRESENT = (
    *("target_modules", "weights", "state_dtype", "other_state"),
    *("release_gradients", "clip_each", "work", "overlap", "overlap_limit", "kernels"),
)
_FLATTENED = "FSDP1"


class StatefulOptimizer(torch.optim.Optimizer):
    """``state``, ``state_dict`` and ``load_state_dict`` of an optimizer that is bound to a layout."""

    config: Any
    layout: Layout | None
    awaiting_layout: bool

    @property
    def _bound(self) -> dict[int, list[Any]]:
        """Pieces with their state by the id of the stepped tensor."""
        raise NotImplementedError

    @property
    def state(self) -> Any:
        """As in ``torch.optim``: the state's tensors by parameter. DeepSpeed gets a dict of its own."""
        if self.awaiting_layout or (self.layout is not None and not self.layout.native):
            return self.__dict__.setdefault("_foreign_state", defaultdict(dict))
        return _StateView(self)

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["_foreign_state"] = value

    def state_dict(self) -> dict[str, Any]:
        """The state in the form of ``torch.optim``, as this module's text has it. The tensors are not copied."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._ensure_bound()
        saved = _save(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave on the same rank of the same layout, or tensors that are whole.

        Raises:
            ConfigError: names, shapes, ranks, variant or layout differ; nothing has been loaded then.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self._ensure_bound()
        _load(self, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _exposed(self, unit: Unit) -> dict[str, dict[str, Exposed]]:
        """State tensors of a stepped tensor by name of the parameter, or of the matrix in a stack."""
        assert self.layout is not None
        p, held = unit.tensor, {bound.piece.name: bound for bound in self._bound[id(unit.tensor)]}
        group, shapes = self.layout.group, {piece.name: piece.shape for piece in unit.pieces}
        if isinstance(p, DTensor) and self._is_stack(unit):
            group, shapes = unit.over, self._experts(p)
        if group is None:
            return {name: expose(unit, b.piece, b.state, self.layout, None) for name, b in held.items()}
        kind = {"dtype": state_dtype(p), "device": local(p).device}
        compensated = self.group_config(self.param_groups[unit.group]).weights == "kahan"

        def low_rank(name: str, shape: tuple[int, ...]) -> Any:
            kept = self._kept_as(name, shape, unit.group)
            return None if kept is None else (kept.ranks, kept.vectors, kept.forms)

        return {
            name: expose(unit, held[name].piece, held[name].state, self.layout, group)
            if name in held
            else elsewhere(shape, low_rank(name, shape), group, compensated, **kind)
            for name, shape in shapes.items()  # in an order that is the same on every rank
        }

    def _is_stack(self, unit: Unit) -> bool:
        """Whether a parameter is a stack of low-rank matrices."""
        p = unit.tensor
        return p.ndim == 3 and self._in_group(self._name(p), tuple(p.shape), unit.group)

    def _experts(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        return {expert_name(self._name(p), e): tuple(p.shape[1:]) for e in range(p.shape[0])}

    def _name(self, p: Tensor) -> str:
        return next(name for name, q, _ in self._named() if q is p)

    def _ensure_bound(self) -> None:
        raise NotImplementedError

    def bind_saved(self, names: Container[str]) -> None:
        """Keep state for the parameters of these names."""
        raise NotImplementedError

    def _in_group(self, name: str, shape: tuple[int, ...], group: int) -> bool:
        raise NotImplementedError

    def _kept_as(self, name: str, shape: tuple[int, ...], group: int) -> Any:
        """By which settings a parameter's state is a matrix's; None if it is a vector's."""
        raise NotImplementedError

    def settle(self) -> None:
        """Bring loaded factors into the optimizer's gauge."""
        raise NotImplementedError

    @classmethod
    def group_config(cls, group: dict[str, Any]) -> Any:
        """The settings of a parameter group."""
        raise NotImplementedError

    def _named(self) -> list[tuple[str, Tensor, int]]:
        raise NotImplementedError


class _StateView(Mapping[Tensor, dict[str, Tensor]]):
    """The state by parameter, put together when it is asked for."""

    def __init__(self, optimizer: StatefulOptimizer) -> None:
        self.optimizer = optimizer

    def _units(self) -> dict[Tensor, Unit]:
        self.optimizer._ensure_bound()
        assert self.optimizer.layout is not None
        return {unit.tensor: unit for unit in self.optimizer.layout.units}

    def __getitem__(self, parameter: Tensor) -> dict[str, Tensor]:
        unit = self._units().get(parameter)
        return {} if unit is None else _entry(self.optimizer, unit)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._units())

    def __len__(self) -> int:
        return len(self._units())


def _entry(optimizer: StatefulOptimizer, unit: Unit) -> dict[str, Any]:
    """The state tensors of a stepped tensor by key, or by name and key if it is not one parameter with one state."""
    found = {n: {k: e.tensor for k, e in keys.items()} for n, keys in optimizer._exposed(unit).items()}
    assert optimizer.layout is not None
    if not optimizer.layout.native or optimizer.layout.name == _FLATTENED or optimizer._is_stack(unit):
        return found
    return found.popitem()[1] if found else {}


def state_dtype(tensor: Tensor) -> torch.dtype:
    """The type of a parameter's state: fp32, or fp64 where that is its own."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# saving -------------------------------------------------------------------------------------------------------------


def _save(optimizer: StatefulOptimizer) -> dict[str, Any]:
    assert optimizer.layout is not None
    groups, count = plain_groups(optimizer.param_groups), 0
    index: dict[int, int] = {}
    for name, p, i in optimizer._named() if optimizer.layout.native else ():
        if id(p) not in optimizer._bound:
            groups[i].setdefault("frozen", []).append(name)
    for packed, group in zip(groups, optimizer.param_groups, strict=True):
        packed["params"] = list(range(count, count + len(group["params"])))
        packed["optimizer"] = optimizer.config.optimizer
        if "param_names" in group:
            packed["param_names"] = list(group["param_names"])
        index.update({id(p): count + k for k, p in enumerate(group["params"])})
        count += len(group["params"])
    state: dict[int, dict[str, Any]] = {}
    for k, unit in enumerate(optimizer.layout.units):
        entry = _entry(optimizer, unit)
        if optimizer.layout.name == _FLATTENED:
            if not entry:  # FSDP1 knows that another rank has it
                continue
            groups[unit.group].setdefault("state", {}).update(entry)
            entry = {"tensors": "param_groups"}  # which torch refuses to flatten, by name
        state[index.get(id(unit.tensor), count + k)] = entry  # ZeRO-3 puts its tensors in the groups to step only
    return {"state": state, "param_groups": groups}


def plain_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The options of parameter groups in lists, numbers and strings."""
    return [{k: _plain(v) for k, v in group.items() if k not in _OURS} for group in groups]


def restore_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Set the options of parameter groups to what :func:`plain_groups` gave; each keeps its type."""
    for group, options in zip(groups, saved, strict=True):
        group.update({k: _like(v, group.get(k)) for k, v in options.items() if k not in (*_OURS, *_PRESENT)})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _like(value: Any, present: Any) -> Any:
    """A saved setting in the type of the present one."""
    if isinstance(value, list) and isinstance(present, tuple):
        return tuple(value)
    value = _plain(value) if isinstance(value, Tensor) else value
    return torch.full_like(present, value) if isinstance(present, Tensor) else value


# loading ------------------------------------------------------------------------------------------------------------


def _load(optimizer: StatefulOptimizer, saved: dict[str, Any]) -> None:
    if not isinstance(saved.get("state"), dict) or not isinstance(saved.get("param_groups"), list):
        raise ConfigError("this is no state_dict of an optimizer: it must have 'state' and 'param_groups'")
    assert optimizer.layout is not None
    found = _group_differences(optimizer, saved["param_groups"])
    entries = _by_name(optimizer, saved, found)
    names = {parameter_name(name) for name in entries}
    for group in optimizer.layout.spread_over:  # FSDP1 saves on each rank what it holds
        names = {name for theirs in all_ranks(names, group) for name in theirs}
    optimizer.bind_saved(names)
    untrained = {n for group in saved["param_groups"] for n in group.get("frozen", ())}
    fresh_bits = dropped = 0
    loads, unknown = [], set(entries) - {piece.name for unit in optimizer.layout.units for piece in unit.pieces}
    for unit in optimizer.layout.units:
        states = {bound.piece.name: bound.state for bound in optimizer._bound[id(unit.tensor)]}
        for name, keys in optimizer._exposed(unit).items():
            unknown.discard(name)
            entry = entries.get(name)
            if entry is None:
                fresh = parameter_name(name) in untrained  # it was frozen then, and begins now
                found += [f"{name}: not in the saved state"] if name in states and not fresh else []
                continue
            entry = recoded(entry, SCALES.keys() <= keys.keys())
            if COMPENSATION in keys and COMPENSATION not in entry:
                fresh_bits += 1
                entry[COMPENSATION] = torch.zeros_like(keys[COMPENSATION].tensor)
            dropped += COMPENSATION in entry and COMPENSATION not in keys
            for key, to in keys.items():
                if (problem := to.check(entry.get(key))) is not None:
                    found.append(f"{name}: {key} {problem}")
            found += [f"{name}: {key} is not finite" for key in keys if not _finite(entry.get(key))]
            loads.append((states.get(name), keys, entry))
    found += [f"{name}: saved, but not a parameter here" for name in sorted(unknown)]
    for group in (*optimizer.layout.spread_over, *optimizer.layout.beyond):  # what is wrong on one is loaded on none
        found = list(dict.fromkeys(problem for theirs in all_ranks(found, group) for problem in theirs))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ConfigError("the optimizer state does not fit: " + "; ".join(found[:3]) + more)
    tell_converted(optimizer, sum(any(to.other_form(e.get(k)) for k, to in keys.items()) for _, keys, e in loads))
    said(fresh_bits, dropped)
    for state, keys, entry in loads:
        for key, to in keys.items():  # also what other ranks of DDP keep: it may be a collective
            to.load(entry[key])
        if state is not None:
            state.step = int(keys["step"].held)  # type: ignore[arg-type]
    restore_groups(optimizer.param_groups, saved["param_groups"])
    optimizer.settle()


def tell_converted(optimizer: Any, count: int) -> None:
    """Say, where some are, that the factors of so many matrices come in another form than they are kept in."""
    if count and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        kept = ", ".join(sorted({str(group["state_dtype"]) for group in optimizer.param_groups}))
        text = f"the factors of {count} matrices were saved in another form, and are converted to state_dtype={kept}"
        warnings.warn(text, stacklevel=4)


def _finite(value: Any) -> bool:
    """Whether this rank's elements of a saved tensor are; anything else passes here."""
    held = value._local_tensor if isinstance(value, DTensor) else value
    held = held.shard.local if isinstance(held, Uneven) else held
    return not isinstance(held, Tensor) or bool(held.isfinite().all())


def _by_name(optimizer: StatefulOptimizer, saved: dict[str, Any], found: list[str]) -> dict[str, dict[str, Any]]:
    """The saved entries by name of the parameter; appends to ``found`` if they cannot be matched."""
    entries: dict[str, dict[str, Any]] = {}
    flat = {}
    for key, entry in saved["state"].items():
        if all(isinstance(value, dict) for value in entry.values()):
            entries.update(entry)
        elif "tensors" not in entry:
            flat[key] = entry
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    if flat:
        for name, key in _match(optimizer, saved["param_groups"], keys, found):
            if key in flat:
                entries[name] = dict(flat[key])
    for group in saved["param_groups"]:
        entries.update(group.get("state", {}))
    for name, entry in entries.items():
        if isinstance(entry.get("step"), Tensor) and entry["step"].ndim == 0:  # as torch.optim's own have it
            entry = entries[name] = {**entry, "step": entry["step"].reshape(1)}
        entries[name] = rooted(entry)
    return entries


def _match(
    optimizer: StatefulOptimizer, groups: list[dict[str, Any]], keys: list[Any], found: list[str]
) -> list[tuple[str, Any]]:
    """Name here and key there of each saved parameter: by name where both sides have them, else by position."""
    ours = [name for name, _, _ in optimizer._named()]
    named = all("param_names" in group for group in [*groups, *optimizer.param_groups])
    if all(isinstance(key, str) for key in keys):  # torch's functions key by name, in our order
        theirs = [clean_name(key) for key in keys]
        named = set(theirs) == set(ours)
    elif named:
        theirs = [clean_name(name) for group in groups for name in group["param_names"]]
    if named and len(theirs) == len(keys):
        return list(zip(theirs, keys, strict=True))
    if len(keys) != len(ours):
        found.append(f"{len(keys)} parameters were saved, there are {len(ours)}")
    return list(zip(ours, keys, strict=False))


def _group_differences(optimizer: StatefulOptimizer, saved: list[dict[str, Any]]) -> list[str]:
    groups, found = optimizer.param_groups, []
    if len(saved) != len(groups):
        found.append(f"{len(saved)} parameter groups were saved, there are {len(groups)}")
    for i, (group, options) in enumerate(zip(groups, saved, strict=False)):
        if options.get("optimizer", optimizer.config.optimizer) != optimizer.config.optimizer:
            found.append(f"group {i}: optimizer was {options['optimizer']}, is {optimizer.config.optimizer}")
        for key in _SHAPING:
            if key in options and _plain(options[key]) != _plain(group.get(key)):
                found.append(f"group {i}: {key} was {options[key]!r}, is {group.get(key)!r}")
    return found
