"""Numbers that a step goes by, and its plan too, which is made where torch takes too long to import."""

from __future__ import annotations

import functools
from dataclasses import dataclass

#: Elements of a matrix's gradient that are looked at to tell its size.
SAMPLES = 64
#: Elements of the Grams that are solved at a time on a CPU.
CHUNK = 1 << 16
#: An accelerator takes blocks so many times as large: there it is not a cache that counts but the number of launches.
ACCELERATOR = 32
#: Symmetric products are taken in so many stripes, of so many rows at least.
STRIPES, ROWS = 4, 64


@dataclass(frozen=True)
class Sizes:
    """How large the transient tensors of a step may be.

    Attributes:
        block: bytes of one row block's p x q temporary on a CPU; three of them exist at a time.
        bucket, accelerator_bucket: bytes of gathered factors, their gradients and Grams that are in flight at a time.
        fewest: matrices are stacked if so many of them fit in a block; by default see :meth:`fewest_on`.
    """

    block: int = 1 << 20
    bucket: int = 32 << 20
    accelerator_bucket: int = 64 << 20
    fewest: int | None = None

    def block_on(self, kind: str) -> int:
        """Bytes of a block's temporary on this kind of device."""
        return self.block if kind == "cpu" else self.block * ACCELERATOR

    def part_on(self, kind: str) -> int:
        """Bytes of each temporary of AdamW's step, of which there are five."""
        return self.block if kind == "cpu" else self.block_on(kind) // 4

    def bucket_on(self, kind: str) -> int:
        """Bytes in flight on this kind of device."""
        return self.bucket if kind == "cpu" else self.accelerator_bucket

    def fewest_on(self, kind: str) -> int:
        """Matrices that are worth a stack, whose weights and gradients have to be copied.

        On a CPU only small ones make up for that; on an accelerator launches count, and copies hardly.
        """
        return self.fewest or (8 if kind == "cpu" else 2)


@functools.cache
def is_striped(n: int, kind: str) -> bool:
    """Whether a symmetric n x n product is taken in stripes, on this kind of device."""
    return n >= ROWS * (2 if kind == "cpu" else STRIPES)


@functools.cache
def stripes(n: int, rows: int = 1) -> tuple[tuple[int, int], ...]:
    """Rows of each stripe of an n x n matrix, at least ``rows`` in all but the last."""
    size = max(rows, -(-n // STRIPES))
    return tuple((low, min(n, low + size)) for low in range(0, n, size))


@functools.cache
def packed_numel(n: int) -> int:
    """Elements of :func:`packed` for an n x n matrix."""
    return sum((high - low) * (n - low) for low, high in stripes(n))
