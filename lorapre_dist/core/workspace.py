"""The buffers that every block and every step reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from .sizes import Sizes


@dataclass(frozen=True)
class Workspace(Sizes):
    """Limits and flat buffers. The buffers grow to what the largest block needs and stay."""

    buffers: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    views: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def rows(self, rows: int, columns: int, like: Tensor) -> int:
        """Rows in a block when a ``rows x columns`` piece is cut into equal ones."""
        limit = max(1, self.block_on(like.device.type) // (columns * like.element_size()))
        return -(-rows // -(-rows // limit))

    def take(self, label: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of ``like``'s dtype and device; one at a time per label."""
        key = (label, like.dtype, like.device)
        view = self.views.get((key, *shape))
        if view is None:
            numel = prod(shape)
            if key not in self.buffers or self.buffers[key].numel() < numel:
                self.views.clear()  # else those of the old buffer would keep it
                self.buffers.pop(key, None)
                self.buffers[key] = like.new_empty(numel)
            view = self.views[(key, *shape)] = self.buffers[key][:numel].view(*shape)
        return view
