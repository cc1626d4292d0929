"""The only file that issues the collectives of a step. Every one is counted by purpose."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Newer PyTorch renames the flat forms and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
#: Collectives are counted by the thread that trains, and by that which works behind it.
_counting = threading.Lock()


def all_ranks(value: Any, group: Any = None) -> list[Any]:
    """The ``value`` of every rank of ``group`` (default: all), in order of rank; a collective, and no part of a step.

    Args:
        value: anything that can be pickled. Without a process group it is the only one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@dataclass
class Comm:
    """Starts collectives and counts them.

    Attributes:
        bytes: by purpose, what this rank sends in a ring implementation: ``(n-1)/n`` of the whole for an
            all-gather or a reduce-scatter over n ranks, twice that for an all-reduce; all of it for a broadcast's
            source and a reduction's others; what leaves for other ranks in an all-to-all.
        calls: number of collectives by purpose.
        twins: by the id of a group, the one over the same ranks on which its collectives are issued instead.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    twins: dict[int, Any] = field(default_factory=dict, repr=False)

    def reset(self) -> None:
        """Forget the counts."""
        self.bytes.clear()
        self.calls.clear()

    def over(self, twins: dict[int, Any]) -> Comm:
        """One of the same kind, with the same counts, whose collectives go over other groups, see ``twins``."""
        made = copy.copy(self)
        made.twins = twins
        return made

    def all_gather(self, local: Tensor, group: Any, purpose: str) -> Callable[[], Tensor]:
        """Start gathering ``local`` (n) from all ranks; the returned function waits and gives (ranks, n)."""
        group = self._own(group)
        size = dist.get_world_size(group)
        sent, back = _staged(local, group)
        out = sent.new_empty(size * sent.numel())
        self._count(purpose, out, (size - 1) / size)
        work = _all_gather(out, sent, group=group, async_op=True)
        return lambda: (work.wait(), back(out).view(size, -1))[1]

    def reduce_scatter(self, blocks: Tensor, group: Any, purpose: str) -> Callable[[], Tensor]:
        """Start summing ``blocks`` (ranks, n) over ranks; the returned function waits and gives this rank's n."""
        group = self._own(group)
        size = dist.get_world_size(group)
        sent, back = _staged(blocks.view(-1), group)
        out = sent.new_empty(sent.numel() // size)
        self._count(purpose, sent, (size - 1) / size)
        work = _reduce_scatter(out, sent, group=group, async_op=True)
        return lambda: (work.wait(), back(out))[1]

    def all_reduce(self, local: Tensor, group: Any, purpose: str, largest: bool = False) -> Callable[[], Tensor]:
        """Start summing ``local`` over ranks, in place; the returned function waits and gives it.

        With ``largest`` it is not the sum but the largest of each number.
        """
        group = self._own(group)
        size = dist.get_world_size(group)
        sent, _ = _staged(local, group)
        self._count(purpose, sent, 2 * (size - 1) / size)
        op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        work = dist.all_reduce(sent, op, group=group, async_op=True)
        return lambda: (work.wait(), local if sent is local else local.copy_(sent))[1]

    def broadcast(self, parts: list[tuple[int, Tensor]], group: Any, purpose: str, limit: int) -> Callable[[], None]:
        """Start sending each part (1-D) from the rank of ``group`` named with it to all others.

        All ranks give the same parts in the same order; they are packed by at most ``limit`` bytes. The returned
        function waits and fills the parts.
        """
        return self._by_owner(parts, group, purpose, limit, dist.broadcast, owner_sends=True)

    def reduce(self, parts: list[tuple[int, Tensor]], group: Any, purpose: str, limit: int) -> Callable[[], None]:
        """Start summing each part (1-D) over all ranks into that of the rank of ``group`` named with it.

        All ranks give parts for the same ranks in the same order; they are packed by at most ``limit`` bytes. The
        returned function waits and fills the parts of their rank; the others' are of no use any more.
        """
        return self._by_owner(parts, group, purpose, limit, dist.reduce, owner_sends=False)

    def _by_owner(
        self,
        parts: list[tuple[int, Tensor]],
        group: Any,
        purpose: str,
        limit: int,
        collective: Callable[..., Any],
        owner_sends: bool,
    ) -> Callable[[], None]:
        """A collective with a root for each packed part; who does not send has the result copied into its parts."""
        group = self._own(group)
        rank, waits = dist.get_rank(group), []
        for owner, tensors in _packed(parts, limit):
            packed = torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()
            sent, back = _staged(packed, group)
            sends = (rank == owner) == owner_sends
            self._count(purpose, sent, 1.0 if sends else 0.0)
            root = dist.get_process_group_ranks(group)[owner]
            waits.append((collective(sent, root, group=group, async_op=True), sent, back, tensors, sends))

        def finish() -> None:
            for work, sent, back, tensors, sends in waits:
                work.wait()
                if not sends:
                    unpack(back(sent), tensors)

        return finish

    def all_to_all(
        self, leaving: list[list[Tensor]], arriving: list[list[Tensor]], group: Any, purpose: str
    ) -> Callable[[], None]:
        """Start sending the tensors ``leaving[k]`` to rank k; the returned function waits and fills ``arriving``.

        Rank k gets them as ``arriving`` of this rank there: as many elements, in the same order.
        """
        flat = [t.reshape(-1) for some in leaving for t in some]
        like = next(t for some in (*leaving, *arriving) for t in some)
        sent = torch.cat(flat) if flat else like.new_empty(0)
        counts = [[sum(t.numel() for t in some) for some in side] for side in (leaving, arriving)]
        wait = self.exchange(sent, like.new_empty(sum(counts[1])), counts, group, purpose)
        return lambda: unpack(wait(), [t for some in arriving for t in some])

    def exchange(
        self, sent: Tensor, received: Tensor, counts: list[list[int]], group: Any, purpose: str
    ) -> Callable[[], Tensor]:
        """Start sending ``sent`` (1-D), packed by rank; the returned function waits and gives what has come, as packed.

        Args:
            received: room for it.
            counts: numbers for each rank, and from each rank.
        """
        group = self._own(group)
        staged, back = _staged(sent, group)
        out = received if staged is sent else staged.new_empty(received.shape)
        self._count(purpose, sent, 1.0)
        work = dist.all_to_all_single(out, staged, counts[1], counts[0], group=group, async_op=True)
        return lambda: (work.wait(), back(out))[1]

    def _own(self, group: Any) -> Any:
        return self.twins.get(id(group), group)

    def _count(self, purpose: str, tensor: Tensor, factor: float) -> None:
        with _counting:
            self.calls[purpose] += 1
            self.bytes[purpose] += round(tensor.numel() * tensor.element_size() * factor)


def _packed(parts: list[tuple[int, Tensor]], limit: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Parts of one sender and dtype together, by at most ``limit`` bytes unless one alone is larger."""
    by_kind: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for owner, tensor in parts:
        by_kind.setdefault((owner, tensor.dtype), []).append(tensor)
    for (owner, _), tensors in by_kind.items():
        run: list[Tensor] = []
        for tensor in tensors:
            if run and sum(t.nbytes for t in run) + tensor.nbytes > limit:
                yield owner, run
                run = []
            run.append(tensor)
        yield owner, run


def unpack(line: Tensor, tensors: list[Tensor]) -> None:
    """Fill tensors from what lies behind each other in ``line``."""
    if tensors:
        sizes = [t.numel() for t in tensors]
        parts = line[: sum(sizes)].split(sizes)
        torch._foreach_copy_(
            tensors, [x if t.ndim == 1 else x.view(t.shape) for x, t in zip(parts, tensors, strict=True)]
        )


def _staged(tensor: Tensor, group: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``tensor`` where the group's backend can send it, and the way back.

    State offloaded to the CPU has to pass through the accelerator when the group speaks NCCL only.
    """
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        home = tensor.device
        return tensor.to(torch.device("cuda", torch.cuda.current_device())), lambda out: out.to(home)
    return tensor, lambda out: out
