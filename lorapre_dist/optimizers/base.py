"""What users construct, step and look at; where its parameters lie is in :mod:`.binding`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import ConfigError, others, param_groups
from ..config.checks import boolean, shown
from ..config.instead import RELEASE_UNDER_DEEPSPEED
from ..core import batching, gauge, owning, rounding
from ..core.background import Background
from ..core.comm import Comm, all_ranks
from ..core.exchange import Item
from ..core.factors import Matrix
from ..core.guard import Go, Skips, bounds, taken_for_granted
from ..core.rules import adamw
from ..core.step import Rule, step
from ..core.whole import by_matrices, element_bytes
from ..core.workspace import Workspace
from ..layouts import detect
from ..layouts.base import Layout, Unit, local, local_gradient
from ..state.full import full_state, load_full_state
from ..state.report import MemoryReport
from . import advise, awaiting, weights
from .binding import Bound, BoundOptimizer, is_low_rank
from .other_rules import other_rule
from .release import Release
from .skipping import Skipping
from .tensors import (
    check_given,
    check_tensors,
    flat,
    name_empty,
    number,
    refuse_duplicates,
    send_stepped,
)


@dataclass
class Stepped:
    """A piece in a step: with it its elements of the stepped tensor and the gradient (1-D), and a bound on the latter.

    ``home`` is set if ``theta`` is a part of a copy: what that was copied from, and the copy.
    """

    bound: Bound
    theta: Tensor
    grad: Tensor
    home: tuple[Tensor, Tensor] | None
    largest: Tensor = field(init=False)


class LowRankOptimizer(BoundOptimizer, Skipping):
    """What all our optimizers share: where the parameters lie, whose state this rank keeps, saving and loading it.

    ``params`` is the model (a ``torch.nn.Module``), ``model.named_parameters()``, or groups of such pairs; a group may
    override any option, and one with ``"rank": 0`` takes AdamW. Bare tensors have no names to select by: then every 2-D
    tensor whose sides exceed ``rank`` is low-rank, which is warned of. Under DeepSpeed the engine supplies names and
    layout.

    Where the parameters lie (FSDP2, FSDP1, tensor parallel, DDP, one device) is found out at the first step.
    ``shard_state`` deals the state out among the ranks of DDP; with False each of them keeps all of it.

    A subclass names its settings' class, and says by which rule a group's matrices are stepped.

    Raises:
        ConfigError: a bad option, duplicate names, or no parameter that is low-rank.
    """

    workspace_limits: ClassVar[Workspace] = Workspace()
    #: On a CPU too, let the device decide whether a step is taken; for tests.
    _decides_on_device: ClassVar[bool] = False

    def __init__(self, params: nn.Module | Iterable[Any], *, shard_state: bool = True, **options: Any) -> None:
        boolean("shard_state", shard_state)
        if not isinstance(params, (Iterable, torch.nn.Module)):  # which torch refuses in words
            raise TypeError(f"params={shown(params)}: must be model.named_parameters(), tensors, or groups of them")
        lr = options.get("lr", self.config_class.lr)
        self.config = self.config_class.from_params({**options, "lr": number(lr)})
        self.comm = Comm()
        self.workspace = replace(self.workspace_limits)
        self.shard_state = shard_state
        self.layout: Layout | None = None
        self.skips = Skips()
        #: Parameters that are no projections by the types of their layers, see :meth:`learn_types`.
        self._other_layers: dict[str, str] = {}
        #: Set while something else (DeepSpeed's engine) is still going to bind the layout; ``step`` then does nothing.
        self.awaiting_layout = awaiting.engine_is_building()
        self._held: dict[int, list[Bound]] = {}
        self._background: Background | None = None
        self._twins: dict[int, Any] = {}
        given = params.named_parameters() if isinstance(params, nn.Module) else params
        super().__init__(given, {**self.config.as_defaults(), "lr": lr})
        if isinstance(params, nn.Module):
            self.learn_types(params)
        detect.check(self.param_groups)
        # FSDP1 shows parameters as 1-D views; their shapes are found with the layout.
        if not self.awaiting_layout and not any(getattr(p, "_fsdp_flattened", False) for _, p, _ in self._named()):
            named = [(n, p, i) for n, p, i in self._named() if p.requires_grad]
            self.check_matches([(n, param_groups.shape_of(p)) for n, p, _ in named], [i for _, _, i in named])
        if self.config.release_gradients and self.awaiting_layout:
            raise ConfigError(RELEASE_UNDER_DEEPSPEED)
        self._release = Release(self) if self.config.release_gradients else None
        advise.of_small_steps(self.config)

    def learn_types(self, model: nn.Module, named: Callable[[str], str] = param_groups.clean_name) -> None:
        """Let the types of a model's layers say what their names do not: which ones are no projections.

        For optimizers that are built of groups: with the model itself, and under DeepSpeed, it is done already.

        Args:
            named: gives a parameter's name from that in ``model``.

        Raises:
            ConfigError: steps have been taken.
        """
        if self._stepped():
            raise ConfigError("learn_types: must come before the first step")
        self._other_layers = param_groups.layer_kinds(model, named)
        self.layout, self._held = None, {}

    def low_rank_names(self, model: nn.Module) -> set[str]:
        """Names of the trainable parameters of ``model`` that are low-rank by the settings of one of the groups."""
        configs = [self.group_config(group) for group in self.param_groups]
        named = [
            (param_groups.clean_name(n), param_groups.shape_of(p))
            for n, p in model.named_parameters()
            if p.requires_grad
        ]
        kept = {n: [self._settings(n, shape, config) for config in configs] for n, shape in named}
        return {n for n, some in kept.items() if any(config is not None and config.rank for config in some)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in ``torch.optim``; options of ``config_class`` in it override the defaults.

        Raises:
            ConfigError: a bad or mistyped option, a parameter that is there already, or a group that comes after
                DeepSpeed's engine was built; the group is not added then.
        """
        if self.layout is not None and not self.layout.native:
            raise ConfigError(
                "a parameter group cannot be added once DeepSpeed's engine is built, which steps buffers that it made "
                "of the groups there were: give all groups to deepspeed.initialize(model_parameters=...)"
            )
        check_given(param_group)
        name_empty([*self.param_groups, param_group])
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            del self.param_groups[-1]
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        config, name = self.group_config(group), self.config.optimizer
        for key in group.keys() - self._options():  # others may keep things of their own in a group
            meant = difflib.get_close_matches(str(key).lower(), self._options(), n=1, cutoff=0.8)
            if meant:
                raise ConfigError(f"unknown {name} option {key!r} in a parameter group; did you mean {meant[0]!r}?")
        check_tensors(group, name)
        if config.release_gradients != self.config.release_gradients:
            raise ConfigError(f"release_gradients={config.release_gradients} in a parameter group: give it for all")
        if not self.awaiting_layout:
            names = group.get("param_names") or [f"number {k}" for k in range(len(group["params"]))]
            weights.check(config.weights, zip(names, group["params"], strict=True))
            if config.target_modules is not None and "param_names" not in group:
                raise ConfigError(
                    f"target_modules={config.target_modules!r}: selects by name, but the parameters have no names; "
                    "pass model.named_parameters()"
                )
            refuse_duplicates([name for name, _, _ in self._named()])
        if len({id(p) for p in group["params"]}) < len(group["params"]):
            raise ConfigError("a parameter appears twice in one of the optimizer's groups")

    def __getstate__(self) -> dict[str, Any]:  # the base class keeps its own fields only, ``state`` among them
        own = {name: getattr(self, name) for name in _OWN}
        empty = replace(self.workspace)  # the limits without the buffers
        base = {"defaults": self.defaults, "param_groups": self.param_groups}
        return {**base, **own, "workspace": empty, "_bound": list(self._bound.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        bound = state["_bound"]
        super().__setstate__({name: value for name, value in state.items() if name != "_bound"})
        units = self.layout.units if self.layout else []
        self._held = {id(unit.tensor): b for unit, b in zip(units, bound, strict=True)}
        self._release = Release(self) if self.config.release_gradients else None

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankOptimizer:
        """A copy with parameters and state of its own, which belongs to the same process groups."""
        known = self.layout.groups() if self.layout is not None else []
        for group in (*known, *self._twins.values()):
            memo[id(group)] = group
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    # settings ---------------------------------------------------------------------------------------------------

    @staticmethod
    def rule(config: Any) -> Rule:
        """How a group's matrices are stepped, from its settings."""
        raise NotImplementedError

    @staticmethod
    def vector_hyper(config: Any, group: dict[str, Any]) -> adamw.Hyper:
        """The numbers that AdamW needs for the group's other parameters."""
        raise NotImplementedError

    # step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter in ``param_groups`` that has a gradient. Collective under sharded layouts.

        With ``overlap`` the parameters are updated when it returns, and the optimizer's own state is not yet: look at
        that through the optimizer, which waits, or call :meth:`synchronize`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.awaiting_layout:  # DeepSpeed's unfused fp16 optimizer steps once, with zero gradients, when it is built
            return loss
        self._ensure_bound()
        assert self.layout is not None
        if self._release is not None:
            self._count(*self._release.finish())
            return loss
        self._advance([p for group in self.param_groups for p in group["params"] if p.grad is not None])
        return loss

    def _advance(self, tensors: list[Tensor], release: Release | None = None) -> None:
        """Step these tensors, which have a gradient; on behalf of ``release`` those that come by themselves."""
        assert self.layout is not None
        self._wait_for(p for group in self.param_groups for p in group["params"])
        pieces = {id(p): self._pieces(p) for p in tensors}
        every = [piece for some in pieces.values() for piece in some]
        _bound_gradients(every)
        looks = self._start_looks(every)  # behind which others say whether all is finite
        go, elsewhere = self._look(every, release)
        known = looks()
        if go is None:
            return
        pieces |= {id(p): self._pieces(p) for p in elsewhere}
        for group in self.param_groups:
            config = self.group_config(group)
            stepped = [piece for p in group["params"] for piece in pieces.get(id(p), ())]
            self._step_group(config, self.vector_hyper(config, group), stepped, go, known)
        send_stepped(self.layout, pieces, self.comm, self.workspace.bucket)

    def _step_group(
        self,
        config: Any,
        vectors: adamw.Hyper,
        pieces: list[Stepped],
        go: dict[Any, Go],
        known: dict[int, Tensor],
    ) -> None:
        items: list[Item] = []
        other: dict[others.Settings, list[Item]] = {}
        rounding.draw([piece.bound.state for piece in pieces])
        for piece in pieces:
            state, taken = piece.bound.state, go[piece.theta.device]
            if isinstance(state, Matrix):
                item = Item(state, piece.theta, piece.grad, piece.largest, taken, known.get(id(state)))
                name, shape = piece.bound.piece.name, piece.bound.piece.shape
                kept = None
                if piece.bound.other:
                    kept = others.settings(name, shape, config, self._other_layers, **asdict(vectors))
                (items if kept is None else other.setdefault(kept, [])).append(item)
            else:
                part = self.workspace.part_on(piece.theta.device.type)
                adamw.step(state, piece.theta, piece.grad, vectors, part, taken, config.kernels)
        if config.work == "matrices":
            by_matrices(items, self.rule(config), self.comm, self.workspace)
        else:
            behind = self._behind(config.overlap, len({item.theta.device for item in items}))
            step(items, self.rule(config), self.comm, self.workspace, behind)
        for kept in sorted(other, key=lambda kept: kept.rank):  # the same order on every rank
            step(other[kept], other_rule(kept), self.comm, self.workspace)
        for held, copied in {id(p.home[0]): p.home for p in pieces if p.home is not None}.values():
            held.copy_(copied.view(held.shape))

    def _look(self, pieces: list[Stepped], release: Release | None = None) -> tuple[dict[Any, Go] | None, list[Tensor]]:
        """Whether the step is taken, by device: on all ranks alike, if every gradient is finite. None: it is not.

        And the tensors that have a gradient on other ranks alone: they are stepped with a zero gradient here.

        Raises:
            NonFiniteError: it was not for ``max_skipped`` steps.
        """
        assert self.layout is not None
        devices = {piece.theta.device for piece in pieces}
        if self.layout.checks_gradients:
            return {device: taken_for_granted(device) for device in devices}, []
        units = self.layout.units if self.layout.spread_over else []
        if release is not None:  # what the others have is what has come here
            units = release.left(units)
        home = next(iter(devices), self.layout.units[0].device if self.layout.units else torch.device("cpu"))
        # How many gradients are not finite, and for each tensor how many ranks have one: in one collective.
        said = torch.ones(1 + len(units), dtype=torch.float64, device=home)
        for k in (0, *(k for k, unit in enumerate(units, 1) if unit.tensor.grad is None)):
            said[k].zero_()  # a number that is assigned comes from the host, which waits for that on a GPU
        for device in devices:
            largest = torch.stack([piece.largest for piece in pieces if piece.theta.device == device])
            said[0] += (~largest.isfinite()).sum().to(home)
        for group in self.layout.spread_over:
            self.comm.all_reduce(said, group, "finite")()
        for group in self.layout.beyond:
            self.comm.all_reduce(said[:1], group, "finite")()
        elsewhere = self._without_gradient(units)
        if elsewhere:  # this rank has to wait for what others say; those that have all gradients need not know
            counts = dict(zip(map(id, units), said[1:].tolist(), strict=True))
            elsewhere = [unit for unit in elsewhere if counts[id(unit)]]
        value = (said[0] == 0).double()
        (self._count if release is None else release.record)(value, [(p.bound.piece.name, p.largest) for p in pieces])
        on_host = home.type == "cpu" and not self._decides_on_device
        if on_host and not value:
            return None, []
        devices |= {unit.device for unit in elsewhere}
        return {d: Go(value.to(d), sure=on_host) for d in devices}, [unit.tensor for unit in elsewhere]

    def _without_gradient(self, units: list[Unit]) -> list[Unit]:
        """The units in which this rank has a part, without a gradient here; what is frozen is so on all ranks."""
        assert self.layout is not None
        lacking = [unit for unit in units if unit.tensor.grad is None and unit.tensor.requires_grad]
        return [unit for unit in lacking if self._held[id(unit.tensor)] or self.layout.sends]

    def _pieces(self, tensor: Tensor) -> list[Stepped]:
        """What there is to step of one tensor; its gradient is zero where there is none."""
        if tensor.grad is not None and tensor.grad.is_sparse:
            raise ConfigError(f"{self.config.optimizer} does not support sparse gradients")
        if id(tensor) not in self._held:
            raise ConfigError(
                f"a tensor in param_groups is not one that {self.config.optimizer} was bound to: wrap the model before "
                "the optimizer steps or loads its state"
            )
        held = local(tensor).detach()
        theta = flat(held)
        grad = torch.zeros_like(theta) if tensor.grad is None else local_gradient(tensor).reshape(-1)
        found = []
        for one in self._held[id(tensor)]:
            part = slice(one.piece.offset, one.piece.offset + one.piece.numel)
            home = None if held.is_contiguous() else (held, theta)
            found.append(Stepped(one, theta[part], grad[part], home))
            if tensor.grad is None:
                found[-1].largest = grad.new_zeros(())
        return found

    # state ------------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """This rank's shards of the low-rank state by parameter name.

        ``m_B`` (rows x r), ``m_A`` (r x columns) and, where the optimizer has them, ``v_B``, ``v_A`` and ``rms_row``
        (rows). On one device they are whole. The tensors are the state itself, not copies.
        """
        return {b.piece.name: b.state.tensors() for b in self.bound() if is_low_rank(b.state)}

    @torch.no_grad()
    def conditions(self) -> dict[str, dict[str, gauge.Condition]]:
        """How the factors stand, by parameter name and moment: norms and condition numbers; a collective.

        In ``stable`` the condition of ``A A^T`` is near 1 by the gauge, and that of ``B^T B`` is of the momentum's
        directions. Factors that drift, or a rank that is far too large, show here first.
        """
        held = [b.state for b in self.bound() if isinstance(b.state, Matrix) and b.state.low_rank]
        return {m.interval.name: c for m, c in zip(held, gauge.conditions(held, Comm()), strict=True)}

    def memory_report(self) -> MemoryReport:
        """Bytes of optimizer state on this rank, what AdamW would hold on it, and the workspace of a step."""
        self._ensure_bound()
        assert self.layout is not None
        workspace, overlap = self._workspace_bound(self.layout), 0
        if self._overlaps():  # one step's rest and another one's beginning at a time
            workspace, overlap = 2 * workspace, self.overlap_bytes()
        return MemoryReport.of([(b.piece, b.state) for b in self.bound()], self.layout, workspace, overlap)

    def workspace_bytes(self, matrices: Sequence[owning.Lies]) -> int:
        """Bound on what a step on these matrices allocates for itself."""
        return batching.workspace_bytes([matrix.outline for matrix in matrices], self.workspace, self._device_kind())

    def _workspace_bound(self, layout: Layout) -> int:
        """Of the largest of what is stepped by rows, by matrices, and by other settings."""
        by: dict[str, list[tuple[Matrix, int]]] = {"rows": [], "matrices": [], "other": []}
        for unit in layout.units:
            work, itemsize = self.param_groups[unit.group]["work"], local(unit.tensor).element_size()
            for bound in self._held[id(unit.tensor)]:
                if isinstance(bound.state, Matrix):
                    by["other" if bound.other else work].append((bound.state, itemsize))
        of = {name: [state for state, _ in some] for name, some in by.items()}
        element = [element_bytes(*pair) for pair in by["matrices"]]
        return max(
            self.workspace_bytes(of["rows"]),
            owning.workspace_bytes(of["matrices"], element, self.workspace, self._device_kind(), self.workspace_bytes),
            LowRankOptimizer.workspace_bytes(self, of["other"]),
        )

    def _device_kind(self) -> str:
        return next((b.state.taken.device.type for b in self.bound()), "cpu")

    def full_state_dict(self) -> dict[str, dict[str, Any]]:
        """The whole state in host memory of rank 0, ``{}`` on the others; a collective, streamed tensor by tensor.

        ``{name: {"m_B": p x r, "m_A": r x q, "v_B", "v_A", "rms_row": p, "step": int}}``, and ``exp_avg``,
        ``exp_avg_sq`` (in the parameter's shape) and ``step`` for the parameters under AdamW.
        """
        return full_state([(b.piece, b.state) for b in self.bound()])

    @torch.no_grad()
    def load_full_state_dict(self, full: dict[str, dict[str, Any]]) -> None:
        """Load what :meth:`full_state_dict` gave, into any layout; a collective. ``full`` counts on rank 0 alone.

        Raises:
            ConfigError: on every rank: names, shapes or ranks differ; nothing has been loaded then.
        """
        self.bind_saved({param_groups.parameter_name(name) for name in all_ranks(list(full))[0]})
        load_full_state(full, [(b.piece, b.state) for b in self.bound()])
        self.settle()


def _bound_gradients(pieces: list[Stepped]) -> None:
    """Say of each piece how large its gradient is at most."""
    for device in {piece.theta.device for piece in pieces}:
        there = [piece for piece in pieces if piece.theta.device == device]
        for piece, largest in zip(there, bounds([piece.grad for piece in there]), strict=True):
            piece.largest = largest


# What a copy of the optimizer takes along.
_OWN = ("_other_layers", "config", "comm", "layout", "awaiting_layout", "shard_state", "skips", "_background", "_twins")
