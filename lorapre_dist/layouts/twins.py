"""Process groups beside those of a layout, for what runs behind training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ..core.comm import all_ranks


def twins(groups: Iterable[Any]) -> dict[int, Any]:
    """For each process group, by its id, another one over the same ranks; a collective over all ranks.

    Every rank makes all groups of all ranks, in one order, with the backend and time limit of the first.
    """
    mine = {id(group): _described(group) for group in groups}
    made = {}
    for ranks, backend, timeout in sorted({one for part in all_ranks(list(mine.values())) for one in part}, key=str):
        made[ranks, backend, timeout] = dist.new_group(list(ranks), backend=backend, timeout=timeout)
    return {key: made[described] for key, described in mine.items()}


def _described(group: Any) -> tuple[tuple[int, ...], str, Any]:
    """Ranks, backend and time limit of a process group."""
    timeout = None
    for kind in ("cuda", "cpu"):
        with contextlib.suppress(Exception):  # of backends without options, or without this device
            timeout = group._get_backend(torch.device(kind)).options._timeout
            break
    return tuple(dist.get_process_group_ranks(group)), dist.get_backend_config(group), timeout
