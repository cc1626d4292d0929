"""How large the transient tensors of a step may be, and the buffers that every block and every step reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

#: An accelerator takes blocks so many times as large: there it is not a cache that counts but the number of launches.
ACCELERATOR = 32


@dataclass(frozen=True)
class Workspace:
    """Limits and flat buffers. The buffers grow to what the largest block needs and stay.

    Attributes:
        block: bytes of one row block's p x q temporary on a CPU; three of them exist at a time.
        bucket, accelerator_bucket: bytes of gathered factors, their gradients and Grams that are in flight at a time.
        fewest: matrices are stacked if so many of them fit in a block; by default see :meth:`fewest_on`.
    """

    block: int = 1 << 20
    bucket: int = 32 << 20
    accelerator_bucket: int = 128 << 20
    fewest: int | None = None
    buffers: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    views: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def block_on(self, device: torch.device) -> int:
        """Bytes of a block's temporary on this device."""
        return self.block if device.type == "cpu" else self.block * ACCELERATOR

    def bucket_on(self, device: torch.device) -> int:
        """Bytes in flight on this device."""
        return self.bucket if device.type == "cpu" else self.accelerator_bucket

    def fewest_on(self, device: torch.device) -> int:
        """Matrices that are worth a stack, whose weights and gradients have to be copied.

        On a CPU only small ones make up for that; on an accelerator launches count, and copies hardly.
        """
        return self.fewest or (8 if device.type == "cpu" else 2)

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
