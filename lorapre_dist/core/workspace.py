"""How large the transient tensors of a step may be, and the buffers that every block and every step reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .sizes import ACCELERATOR, BLOCK, BUCKET


@dataclass(frozen=True)
class Workspace:
    """Limits and flat buffers. The buffers grow to what the largest block needs and stay.

    Attributes:
        block: bytes of one row block's p x q temporary on a CPU; three of them exist at a time.
        bucket: bytes of gathered factors, their gradients and Grams that are in flight at a time.
    """

    block: int = BLOCK
    bucket: int = BUCKET
    buffers: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    views: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def block_on(self, device: torch.device) -> int:
        """Bytes of a block's temporary on this device."""
        return self.block if device.type == "cpu" else self.block * ACCELERATOR

    def rows(self, rows: int, columns: int, like: Tensor) -> int:
        """Rows in a block when a ``rows x columns`` piece is cut into equal ones."""
        limit = max(1, self.block_on(like.device) // (columns * like.element_size()))
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
