"""Every rank holds whole parameters: one device, and DeepSpeed's ZeRO-0 (with or without fp32 master copies)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .base import Layout, Piece, Unit


def layout(named: Iterable[tuple[str, torch.Tensor, int]], name: str = "one device") -> Layout:
    """A layout of whole parameters, given as (name, stepped tensor, index of its group)."""
    return Layout(name, [Unit(t, group, [Piece(n, tuple(t.shape), 0, t.numel(), 0)]) for n, t, group in named])
