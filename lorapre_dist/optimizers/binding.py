"""Where an optimizer's parameters lie, by whose settings each is stepped, and the state that this rank keeps of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..config import ConfigError, LowRankConfig, others, param_groups
from ..core import gauge, kernels
from ..core.comm import Comm
from ..core.factors import Matrix, allocate
from ..core.interval import RowInterval
from ..core.rules import adamw
from ..layouts import detect
from ..layouts.base import Layout, Piece, Unit, local
from ..layouts.groups import connect
from ..layouts.matrices import arrange
from ..state.state_dict import StatefulOptimizer, state_dtype
from . import advise, agreement, weights
from .overlap import Overlapping
from .release import check_release
from .tensors import may_step, number, refuse_duplicates, stays_on_device


@dataclass
class Bound:
    """A piece of a parameter, and the state that this rank keeps for it.

    ``other``: it is a matrix to the core, but no projection, see ``config/others.py``.
    """

    piece: Piece
    state: Matrix | adamw.Vector
    other: bool = False


@functools.cache
def _options(config_class: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(config_class))


@functools.lru_cache(maxsize=256)
def _validated(config_class: Any, values: tuple[tuple[str, Any], ...], _: str) -> Any:
    """Settings, checked once for values so written (False is 0 to Python): a step asks for them again and again."""
    return config_class(**dict(values))


class BoundOptimizer(Overlapping, StatefulOptimizer):
    """An optimizer that finds out where its parameters lie, on first use, unless an engine tells it."""

    config_class: ClassVar[type[LowRankConfig]]
    shard_state: bool
    _other_layers: dict[str, str]

    @classmethod
    def _options(cls) -> tuple[str, ...]:
        kind: Any = cls.config_class
        return _options(kind)

    @classmethod
    def group_config(cls, group: dict[str, Any]) -> Any:
        """The settings of a parameter group, validated: a ``config_class``.

        An ``lr`` that is a 0-d tensor on an accelerator stays one, unchecked: the host would have to wait for it.
        """
        lr = group["lr"]
        waits = stays_on_device(lr)
        kind: Any = cls.config_class
        numbers = {"lr": kind.lr if waits else number(lr)}
        values = tuple((name, numbers.get(name, group[name])) for name in cls._options())
        try:
            config = _validated(kind, values, repr(values))
        except TypeError:  # of what cannot be looked up, such as a list
            config = kind(**dict(values))
        if waits:
            config = copy.copy(config)
            object.__setattr__(config, "lr", lr)
        return config

    def bind(self, layout: Layout) -> None:
        """Take ``layout`` for where the parameters lie, and allocate the state of this rank.

        Raises:
            ConfigError: a name appears twice, or steps have been taken already.
        """
        if self._stepped():
            raise ConfigError(f"cannot change the layout of a {self.config.optimizer} optimizer after its first step")
        if self.config.release_gradients:
            check_release(layout)
        self.synchronize()
        self._held, self.layout, self.awaiting_layout = {}, layout, False
        try:
            arrange(layout, self._in_group)
            connect(layout)
            for unit in layout.units:
                self._bind_unit(unit)
            refuse_duplicates([b.piece.name for bound in self._held.values() for b in bound])
            self._settle(layout.units, fresh=True)
            if self._overlaps():
                self._make_background()
        except ConfigError:  # and not half of it
            self._held, self.layout = {}, None
            raise

    def _settle(self, units: Iterable[Unit], fresh: bool = False) -> None:
        """Bring the factors of some units, new ones or (unless they are there already) loaded ones, into the gauge."""
        for unit in units:
            config = self.group_config(self.param_groups[unit.group])
            matrices = [b.state for b in self._held[id(unit.tensor)] if isinstance(b.state, Matrix)]
            # A plan has no elements, or peers without a group.
            matrices = [m for m in matrices if m.low_rank]
            ready = [m for m in matrices if not m.taken.is_meta and (m.peers is None or m.peers.group is not None)]
            if config.variant == "stable" and ready:
                gauge.settle(ready, config.resolved_damping, Comm(), fresh)  # no part of a step

    def settle(self) -> None:
        """After factors were loaded: bring those that are not in the optimizer's gauge into it; a collective."""
        assert self.layout is not None
        self.state_written()
        self._settle(self.layout.units)

    def _stepped(self) -> bool:
        return any(b.state.step for bound in self._held.values() for b in bound)

    def _bind_unit(self, unit: Unit) -> None:
        config = self.group_config(self.param_groups[unit.group])
        device = local(unit.tensor).device
        dtype = state_dtype(unit.tensor)
        why = kernels.problem(config.kernels, dtype, device)
        if why is not None and device.type != "meta":
            raise ConfigError(why)
        weights.check(config.weights, [(piece.name, unit.tensor) for piece in unit.pieces], self.layout)
        bound = []
        for piece in [piece for piece in unit.pieces if piece.owned]:
            state: Matrix | adamw.Vector
            kept = self._settings(piece.name, piece.shape, config)
            if kept is not None:
                if not piece.numel and piece.peers is None:  # as in FSDP1, which shows it on every rank
                    continue
                shape = piece.shape[0], piece.shape[1]
                interval = RowInterval(piece.name, shape, piece.start, piece.stop, piece.columns)
                state = allocate(
                    interval,
                    piece.peers,
                    ranks=kept.ranks,
                    vectors=kept.vectors,
                    optimizer=kept.optimizer,
                    variant=kept.variant,
                    init_std=kept.init_std,
                    seed=kept.seed,
                    device=device,
                    dtype=dtype,
                    before=piece.before,
                    kept=kept.forms,
                    rounding=weights.rounding(config, piece, device),
                )
            else:
                state = adamw.allocate(piece.numel, device, dtype, weights.rounding(config, piece, device))
            bound.append(Bound(piece, state, other=kept is not None and kept is not config))
        self._held[id(unit.tensor)] = bound

    def _is_low_rank(self, name: str, shape: tuple[int, ...], config: LowRankConfig) -> bool:
        targets: Any = ".*" if name.startswith(_UNNAMED) else config.target_modules
        if targets is None and param_groups.parameter_name(name) in self._other_layers:
            return False
        return param_groups.is_low_rank(name, shape, config.rank, config.resolved_rank_v, targets)

    def _settings(self, name: str, shape: tuple[int, ...], config: LowRankConfig) -> LowRankConfig | None:
        """By which settings a parameter's state is a matrix's: its group's, or those of ``others``; None: it is not."""
        if self._is_low_rank(name, shape, config):
            return config
        return others.settings(name, shape, config, self._other_layers)

    def _kept_as(self, name: str, shape: tuple[int, ...], group: int) -> LowRankConfig | None:
        return self._settings(name, shape, self.group_config(self.param_groups[group]))

    def _in_group(self, name: str, shape: tuple[int, ...], group: int) -> bool:
        return self._kept_as(name, shape, group) is not None

    def _named(self) -> list[tuple[str, Tensor, int]]:
        """The parameters as given to the constructor: (name, tensor, index of its group)."""
        found = []
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{_UNNAMED}{index}.{k}" for k in range(len(group["params"]))]
            found += [(param_groups.clean_name(n), p, index) for n, p in zip(names, group["params"], strict=True)]
        return found

    def check_matches(self, named_shapes: list[tuple[str, tuple[int, ...]]], groups: list[int] | None = None) -> None:
        """Raise a ConfigError unless one of these parameters is low-rank by its group's settings.

        Args:
            named_shapes: name and shape of every trainable parameter.
            groups: index of the group of each; None if that is not known: any group's settings count then.
        """
        configs = [self.group_config(group) for group in self.param_groups]
        if not any(config.rank for config in configs):
            raise ConfigError("rank=0: every parameter group has it, so that none is low-rank; use torch.optim.AdamW")
        of_group = [configs if groups is None else [configs[i]] for i in groups or range(len(named_shapes))]
        pairs = [(n, s, c) for (n, s), some in zip(named_shapes, of_group, strict=True) for c in some if c.rank]
        # Other stages of a pipeline may have some.
        if not any(self._is_low_rank(*pair) for pair in pairs) and not detect.find(self._named()).beyond:
            unnamed = any(n.startswith(_UNNAMED) for n, _, _ in pairs)
            raise ConfigError(param_groups.explain_no_match_of(pairs, self.config, unnamed))

    def _ensure_bound(self) -> None:
        """Find the layout, on first use, unless one was bound; parameters that come later are bound as well."""
        if self.awaiting_layout:
            raise ConfigError(
                f"this {self.config.optimizer} optimizer waits for DeepSpeed's engine to tell where its parameters lie"
            )
        if self.layout is not None and self.layout.replaced(self.param_groups) and not self._stepped():
            self.layout = None  # Accelerate looks at the state first, and then puts FSDP2's shards in
        if self.layout is None:
            found = self._find(lambda _, p: may_step(p))
            shapes = {piece.name: (piece.shape, unit.group) for unit in found.units for piece in unit.pieces}
            self.check_matches([(n, s) for n, (s, _) in shapes.items()], [g for _, g in shapes.values()])
            self.bind(found)
            self._advise_names()
        elif self.layout.native and not self.layout.replaced(self.param_groups):
            tensors = (p for group in self.param_groups for p in group["params"])
            if any(id(p) not in self._held and may_step(p) for p in tensors):
                self._extend(self._find(lambda _, p: may_step(p)))

    def bind_saved(self, names: Container[str]) -> None:
        """Keep state for the parameters of these names, which have some saved, also where they are frozen here.

        What is trained and has none comes behind them, so that they lie as they did; a collective.
        """
        self._ensure_bound()
        assert self.layout is not None
        ours = {name: id(p) in self._held for name, p, _ in self._named()}
        if not self.layout.native or all(bound == (name in names) for name, bound in ours.items()):
            return
        if not self._stepped() and any(name in names for name in ours):
            self.layout = None
            self.bind(self._find(lambda name, _: name in names))
        else:
            self._extend(self._find(lambda name, _: name in names))
        self._ensure_bound()

    def _find(self, wanted: Callable[[str, Tensor], bool]) -> Layout:
        """The layout of those wanted (by name and tensor) that are not bound yet; a collective.

        Raises:
            ConfigError: the ranks do not agree on what they have built.
        """
        place = detect.find(self._named())
        if not place.alone:
            agreement.require(agreement.of_optimizer(self, place.shapes), place.group, place.shares)
        bound = self._held if self.layout is not None else {}
        named = [(n, p, i) for n, p, i in self._named() if wanted(n, p) and id(p) not in bound]
        return detect.layout(place, named, self.shard_state, self._in_group)

    def _extend(self, added: Layout) -> None:
        """Bind more parameters: such as came with a group, or were frozen when the layout was bound."""
        assert self.layout is not None
        added.numbered = self.layout.numbered
        added.known |= self.layout.known
        arrange(added, self._in_group)
        connect(added)
        self.layout.extend(added)
        for unit in added.units:
            self._bind_unit(unit)
        self._settle(added.units, fresh=True)
        if self._overlaps():
            self._make_background()

    def _advise_names(self) -> None:
        """Warn if matrices are low-rank for want of a name. Who gave a group ``"rank": 0`` has chosen."""
        shapes = {n.removeprefix(_UNNAMED): p.shape for n, p, _ in self._named() if n.startswith(_UNNAMED)}
        low_rank = {b.piece.name for b in self.bound() if is_low_rank(b.state)}
        taken = {f"parameter {n}": s for n, s in shapes.items() if f"{_UNNAMED}{n}" in low_rank}
        if taken and all(group["rank"] for group in self.param_groups):
            advise.of_missing_names(self.config.optimizer, taken)

    def bound(self) -> list[Bound]:
        """This rank's pieces with their state, in the order in which they are stepped."""
        self._ensure_bound()
        return [b for bound in self._bound.values() for b in bound]


def is_low_rank(state: Matrix | adamw.Vector) -> bool:
    """Whether state is that of a matrix with factors."""
    return isinstance(state, Matrix) and state.low_rank


_UNNAMED = "unnamed."
