"""How large the transient tensors of a step may be, and the buffers that every block and every step reuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workspace:
    """Limits and flat buffers. The buffers grow to what the largest block needs and stay.

    Attributes:
        block: bytes of one row block's p x q temporary; three of them exist at a time.
        bucket: bytes of gathered factors, their gradients and Grams that are in flight at a time.
    """

    block: int = 2 << 20
    bucket: int = 32 << 20
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def rows(self, rows: int, columns: int, like: Tensor) -> int:
        """Rows in a block when a ``rows x columns`` piece is cut into equal ones."""
        limit = max(1, self.block // (columns * like.element_size()))
        return -(-rows // -(-rows // limit))

    def take(self, label: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised ``rows x columns`` tensor of ``like``'s dtype and device; one at a time per label."""
        key, numel = (label, like.dtype, like.device), rows * columns
        have = self.buffers.get(key)
        if have is None or have.numel() < numel:
            self.buffers.pop(key, None)
            have = self.buffers[key] = like.new_empty(numel)
        return have[:numel].view(rows, columns)
