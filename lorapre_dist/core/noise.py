"""Random bits that are a function of seed, parameter, step, stream and element: every layout draws the same ones.

A key of 64 bits stands for seed and name. Once in a step it is mixed with the step's number and that of a stream (what
is rounded: the weights, or one tensor of state) to two words, under which a hash of an element's place in its tensor,
in row-major order, has the bits. Nothing is stored, and nobody has to draw in an order.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

#: Streams of a parameter: its weights, AdamW's moments in 8 bits, and factors from here on (two of each moment).
WEIGHTS, CODES, FACTORS = 0, 1, 2

# Odd factors of two 32-bit rounds (the constants of "lowbias32") and of splitmix64, as signed integers.
_FACTORS_32 = (0x7FEB352D, 0x846CA68B - (1 << 32))
_FACTORS_64 = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_STEP_64, _STREAM_64 = 0x9E3779B97F4A7C15 - (1 << 64), 0xD1342543DE82EF95 - (1 << 64)


def key(seed: int, name: str, device: torch.device) -> Tensor:
    """That of a parameter (0-d, int64)."""
    digest = hashlib.blake2b(f"{seed}:rounding:{name}".encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True), device=device)


def draw(keys: Tensor, taken: Tensor, stream: int) -> Tensor:
    """The words of k parameters for a step and a stream: k x 2, int32; of one (0-d) 2.

    Args:
        keys: k, int64, of :func:`key`.
        taken: k, steps so far.
    """
    mixed = _mixed(keys + taken.to(torch.int64) * _STEP_64 + signed(stream * _STREAM_64, 64))
    return torch.stack([mixed, mixed >> 32], dim=-1).to(torch.int32)


def places(rows: tuple[int, int], columns: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """Row-major places, modulo 2^32, of a block of a matrix of so many columns: rows x columns, int32."""
    down = torch.arange(rows[1] - rows[0], dtype=torch.int32, device=device).mul_(signed(width, 32))
    across = torch.arange(columns[1] - columns[0], dtype=torch.int32, device=device)
    return down[:, None] + across.add_(signed(rows[0] * width + columns[0], 32))


def bits(index: Tensor, words: Tensor) -> Tensor:
    """32 bits of each element of ``index`` (n, int32), under each pair of words (2, or k x 2): n, or k x n.

    Two rounds, each of which a word opens. The upper 16 bits are the better mixed ones, and :func:`halves` has two
    numbers of 16. Elements 2^32 apart get the same bits.
    """
    x, spare = index, None
    for k, (shift, factor) in enumerate(zip((16, 15), _FACTORS_32, strict=True)):
        x = x.bitwise_xor_(words[..., k, None]) if spare is not None else torch.bitwise_xor(x, words[..., k, None])
        spare = torch.bitwise_right_shift(x, shift, out=spare)
        x.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return x


def upper(x: Tensor) -> Tensor:
    """The upper 16 of 32 bits, in place."""
    return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent numbers of 16 bits from one of 32."""
    high = torch.bitwise_right_shift(x, 16).bitwise_and_(0xFFFF)
    return high, x.bitwise_xor_(high).bitwise_and_(0xFFFF)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser of int64 numbers."""
    for shift, factor in zip((30, 27), _FACTORS_64, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def signed(value: int, bits: int) -> int:
    """A number modulo ``2^bits``, as a signed integer of so many."""
    half = 1 << (bits - 1)
    return (value + half) % (1 << bits) - half
