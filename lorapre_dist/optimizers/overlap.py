"""``overlap``: what of a step the weights do not wait for runs behind training, and is waited for at any look.

All state is reached through ``_bound``, which waits; only a step itself goes by ``_held``, having waited for what it is
about to touch. So no door can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..config import ConfigError
from ..core import batching, exchange
from ..core.background import Background
from ..core.comm import Comm, all_ranks
from ..core.factors import Matrix
from ..core.step import Behind
from ..core.workspace import Workspace
from ..layouts.base import Layout
from ..layouts.groups import twins
from .tensors import may_step


class Overlapping:
    """The part of an optimizer that knows of ``overlap``."""

    comm: Comm
    layout: Layout | None
    param_groups: list[dict[str, Any]]
    workspace: Workspace
    _held: dict[int, list[Any]]
    _background: Background | None = None
    _workspace_behind: Workspace | None = None
    _twins: dict[int, Any]

    @property
    def _bound(self) -> dict[int, list[Any]]:
        """The pieces and the state of every stepped tensor, by its id, when nothing changes them any more."""
        self.synchronize()
        return self._held

    def synchronize(self) -> None:
        """Wait for what the last steps have left to run behind training; on accelerators the current stream waits.

        Everything that shows, saves, loads or copies the state does so by itself. It is for tensors of the state that
        were looked up before a step and are read after it, and for the end of a program that goes on to destroy its
        process groups. Local: ranks need not call it together.

        Raises:
            RuntimeError: what went wrong there, a rank that is lost, say.
        """
        if self._background is not None:
            self._background.wait()

    def state_written(self) -> None:
        """Say that factors were written to by others than a step: what was worked out of them ahead counts no more.

        To be called on all ranks that share them. Everything here that loads state does.
        """
        for bound in self._bound.values():
            for state in (one.state for one in bound if isinstance(one.state, Matrix)):
                for factors in state.factors.values():
                    factors.ahead = None

    def overlap_bytes(self) -> int:
        """Bytes that ``overlap`` keeps on this rank beside the state, at most: the new A, whole, and Z on its way."""
        assert self.layout is not None
        units = [unit for unit in self.layout.units if self.param_groups[unit.group]["overlap"]]
        states = [bound.state for unit in units for bound in self._held[id(unit.tensor)] if not bound.other]
        return sum(batching.overlap_bytes(s.outline, s.variant == "paper") for s in states if isinstance(s, Matrix))

    def _overlaps(self) -> bool:
        return any(group["overlap"] for group in self.param_groups)

    def _make_background(self) -> None:
        """Process groups for what runs behind training; a collective wherever binding the layout is one.

        Raises:
            ConfigError: on all ranks, if one of them would keep more than ``overlap_limit``.
        """
        assert self.layout is not None
        self._check_limit(self.layout)
        if self._background is None:
            self._background = Background()
        pieces = [piece for unit in self.layout.units for piece in unit.pieces]
        shared = {id(piece.peers.group): piece.peers.group for piece in pieces if piece.peers is not None}
        # A plan of ranks has no groups.
        lacking = [group for key, group in shared.items() if key not in self._twins and group is not None]
        if self.layout.is_joint or lacking:
            self._twins = {**self._twins, **twins(lacking)}

    def _check_limit(self, layout: Layout) -> None:
        limits = [g["overlap_limit"] for g in self.param_groups if g["overlap"] and g["overlap_limit"] is not None]
        if not limits:
            return
        kept = [self.overlap_bytes()]
        if layout.is_joint or layout.together is not None:
            kept = all_ranks(kept[0], layout.together)
        if max(kept) > min(limits):
            raise ConfigError(
                f"overlap=True keeps {max(kept)} bytes on rank {kept.index(max(kept))} beside the optimizer's state, "
                f"more than overlap_limit={min(limits)}: raise that, lower rank, use more ranks, or leave overlap off"
            )

    def _wait_for(self, tensors: Iterable[Tensor]) -> None:
        """Before a step: wait for what the last one of these tensors has left."""
        if self._background is not None:
            self._background.wait([bound.state for t in tensors for bound in self._held.get(id(t), ())])

    def _behind(self, overlap: bool, devices: int) -> Behind | None:
        """Where the rest of a group's step runs; None where it is part of the step."""
        if not overlap or devices != 1:
            return None
        if self._background is None:  # the option was changed since
            self._make_background()
        if self._workspace_behind != self.workspace or self._workspace_behind is None:
            self._workspace_behind = replace(self.workspace)
        assert self._background is not None
        return Behind(self._background, self.comm.over(self._twins), self._workspace_behind)

    def _start_looks(self, pieces: Iterable[Any]) -> Callable[[], dict[int, Tensor]]:
        """Start to exchange what each rank knows of gradients, before it is known whether they are finite.

        Ranks may have gradients of different parameters; so all are exchanged that any rank may step.
        """
        if not self._overlaps():
            return dict
        assert self.layout is not None
        given = {id(piece.bound.state): piece for piece in pieces}
        together = bool(self.layout.spread_over)
        seen = []
        for unit in self.layout.units:
            if not self.param_groups[unit.group]["overlap"]:
                continue
            for state in (bound.state for bound in self._held[id(unit.tensor)] if not bound.other):
                piece = given.get(id(state))
                wanted = piece is not None or (together and may_step(unit.tensor))
                if wanted and isinstance(state, Matrix) and state.peers is not None:
                    seen.append(exchange.Seen(state, *((piece.grad, piece.largest) if piece else (None, None))))
        return exchange.look(seen, self.comm) if seen else dict
