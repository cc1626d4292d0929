"""The state as ``torch.optim`` and ``torch.distributed.checkpoint`` know it: tensors of global shape, per parameter.

What every rank has whole is a plain tensor, what is spread over ranks a DTensor: ``m_B`` in rows, ``m_A`` in columns,
AdamW's as the parameter. Where the ranks' parts are no chunks of one size (a matrix that one rank of DDP keeps, rows
cut between ranks) the DTensor's local tensor is a :class:`Uneven`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.utils._pytree import tree_map_only

from ..config import ConfigError
from ..core.factors import Matrix, state_shapes
from ..core.forms import length
from ..core.interval import column_block
from ..core.quantized import converted, form_of, rank_of
from ..core.rounding import COMPENSATION
from ..core.spec import Axis, axis_of, of_matrix, of_vector
from ..layouts.base import Layout, Piece, Unit, local
from ..layouts.geometry.ranges import equal_ranges
from .shards import Shard, elementwise, like, matrix_shards

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default}
_COPY = {_aten.clone.default, _aten._to_copy.default}


@dataclass(frozen=True)
class _Ranks:
    """A process group; copies share it."""

    group: Any

    def __deepcopy__(self, _: Any) -> _Ranks:
        return self


class Uneven(Tensor):
    """The local tensor of a DTensor, whose ranks hold other elements than its placement says.

    Storage sees what really is here, by DCP's protocol. Before any other operation, the elements are moved to where the
    placement says: a collective over ``ranks``, refused if that is no group because not all of the mesh take part.
    """

    shard: Shard
    ranks: _Ranks

    @staticmethod
    def __new__(cls, shard: Shard, size: tuple[int, ...], group: Any = None) -> Uneven:
        """A part of which DTensor takes the local shape to be ``size``."""
        part: Uneven = Tensor._make_wrapper_subclass(cls, size, dtype=shard.local.dtype, device=shard.local.device)
        part.shard, part.ranks = shard, _Ranks(group)
        return part

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[WriteItem]:
        return self.shard.__create_write_items__(fqn, tensor)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.shard.__create_chunk_list__()

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.shard.__get_tensor_shard__(index)

    def _of(self, elements: Tensor) -> Uneven:
        s = self.shard
        return Uneven(Shard(s.shape, s.start, elements, s.dim, s.skip), tuple(self.shape), self.ranks.group)

    def chunk(self) -> Tensor:  # type: ignore[override]
        """The elements that the placement says are here; a collective."""
        group = self.ranks.group
        if group is None:
            raise ConfigError(
                "this layout's state cannot be gathered by torch's full_state_dict or async_save: use "
                "optimizer.full_state_dict() or lorapre_dist.checkpoint"
            )
        s, owned = self.shard, self.shard.owned
        whole = s.local.new_zeros(s.shape)
        whole.narrow(s.dim, s.start + s.skip, owned.shape[s.dim]).copy_(owned)
        dist.all_reduce(whole, group=group)  # sums with zeros: of bytes, too
        first, last = column_block(s.shape[s.dim], dist.get_world_size(group), dist.get_rank(group))
        return whole.narrow(s.dim, first, last - first)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SAME or (func is _aten.view.default and tuple(args[1]) == tuple(args[0].shape)):
            return args[0]._of(args[0].shard.local)
        if func is _aten.new_empty.default and tuple(args[1]) == tuple(args[0].shape):  # to be filled, by async_save
            return args[0]._of(args[0].shard.local.new_empty(args[0].shard.local.shape, **kwargs))
        if func in _COPY:
            return args[0]._of(func(args[0].shard.local, *args[1:], **kwargs))
        if func._schema.is_mutable and isinstance(args[0], Uneven):
            raise ConfigError(
                "this layout's state cannot be loaded with broadcast_from_rank0: give every rank the full state"
            )
        args, kwargs = tree_map_only(Uneven, Uneven.chunk, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Uneven:
        return self._of(copy.deepcopy(self.shard.local, memo))

    def __reduce_ex__(self, _: Any) -> Any:
        s = self.shard
        return _part, (s.shape, s.start, s.local, s.dim, s.skip, tuple(self.shape))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Uneven({self.shard})"


# The name stands in files that torch.save has written.
def _part(shape: Any, start: int, elements: Tensor, dim: int, skip: int, size: Any) -> Uneven:
    return Uneven(Shard(tuple(shape), start, elements, dim, skip), tuple(size))


torch.serialization.add_safe_globals([_part])


@dataclass
class Exposed:
    """One state tensor: as others see it, and this rank's part of it as the optimizer holds it (None: nothing).

    ``vectors`` is the dimension along which a factor's vectors lie, which may be loaded from another form of it; None
    if it is no factor.
    """

    tensor: Tensor
    held: Tensor | None
    vectors: int | None = None

    def load(self, value: Tensor) -> None:
        """Copy ``value``, of the tensor's global shape, into what is held; a collective if it lies otherwise."""
        mine = self._mine(value)
        if self.vectors is not None and self.held is not None:
            mine = converted(mine, self.held, self.vectors)
        # Storage reads into the state itself; strides of dimensions of one element may differ then.
        if self.held is not None and (mine.data_ptr() != self.held.data_ptr() or mine.shape != self.held.shape):
            self.held.copy_(mine)

    def check(self, value: Any) -> str | None:
        """Why ``value`` cannot be loaded, in words, or None."""
        shape = f"is of shape {tuple(self.tensor.shape)}"
        if not isinstance(value, Tensor):
            return f"was missing, {shape}" if value is None else f"was a {type(value).__name__}, {shape}"
        if value.shape != self._shape_as(value):
            return f"was of shape {tuple(value.shape)}, {shape}"
        if isinstance(value, DTensor):
            if isinstance(self.tensor, DTensor) and value.device_mesh.shape == self.tensor.device_mesh.shape:
                theirs, ours = value._local_tensor, self.tensor._local_tensor
                if not isinstance(theirs, Uneven) or (isinstance(ours, Uneven) and _place(theirs) == _place(ours)):
                    return None
            return "is another rank's, or was split otherwise: torch.distributed.checkpoint would reshard it"
        return None

    def other_form(self, value: Any) -> bool:
        """Whether ``value`` is a factor in another form."""
        return self.vectors is not None and isinstance(value, Tensor) and form_of(value) != form_of(self.tensor)

    def _shape_as(self, value: Tensor) -> torch.Size:
        """Shape of the whole tensor in the form of ``value``."""
        shape = list(self.tensor.shape)
        if self.vectors is not None:
            shape[self.vectors] = length(rank_of(self.tensor, self.vectors), form_of(value))
        return torch.Size(shape)

    def _mine(self, value: Tensor) -> Tensor:
        here = self.tensor
        if not isinstance(here, DTensor):
            return value
        part = here._local_tensor
        if isinstance(value, DTensor):
            if isinstance(value._local_tensor, Uneven):
                return value._local_tensor.shard.local
            if not isinstance(part, Uneven) and value.placements == here.placements:
                return value._local_tensor
            value = value.full_tensor()
        if isinstance(part, Uneven):
            s = part.shard
            return value.narrow(s.dim, s.start, s.local.shape[s.dim])
        moved = value.to(here.device_mesh.device_type)
        return distribute_tensor(moved, here.device_mesh, here.placements, src_data_rank=None)._local_tensor


def _place(part: Uneven) -> tuple[Any, ...]:
    s = part.shard
    return tuple(s.shape), s.start, s.dim, s.skip, tuple(s.local.shape)


def expose(unit: Unit, piece: Piece, state: Any, layout: Layout, group: Any) -> dict[str, Exposed]:
    """The state of a piece of a stepped tensor by key: ``step``, and ``m_B`` and so on, or ``exp_avg`` and so on.

    Args:
        group: whose ranks keep the states of DDP's parameters, or of a stack's matrices, between them; else None.
    """
    p = unit.tensor
    flattened = bool(getattr(p, "_fsdp_flattened", False))
    alone = group is None and not flattened and local(p).numel() == p.numel()
    alone = alone and (layout.native or layout.world_size == 1)
    found = {}
    for key, shard in (matrix_shards(state) if isinstance(state, Matrix) else {}).items():
        vectors = _vectors(key)
        if alone:
            found[key] = Exposed(shard.local, shard.local, vectors)
        elif group is not None or flattened or state.peers is None:
            if axis_of(key) is Axis.ALL_COLUMNS and state.peers is not None and state.peers.index:
                shard.skip = len(shard.local)  # all of its holders have it, the first one writes it
            found[key] = Exposed(spread(shard, group), shard.local, vectors)
        else:
            split = {Axis.COLUMNS: Split(1), Axis.ALL_COLUMNS: Replicate()}.get(axis_of(key)) or _rows(state)
            found[key] = Exposed(spread(shard, state.peers.group, split), shard.local, vectors)
    for key, tensor in elementwise(state).items():
        inner = tensor.shape[1:]
        if isinstance(p, DTensor) and len(piece.shape) == p.ndim and piece.numel == local(p).numel():
            found[key] = Exposed(like(p, tensor), tensor.view((*local(p).shape, *inner)))
        elif alone:
            whole = tensor.view((*piece.shape, *inner))
            found[key] = Exposed(whole, whole)
        elif group is not None:
            rows = _dim0(piece, tensor)
            placed = None if isinstance(state, Matrix) else Split(0)  # a matrix is one rank's
            found[key] = Exposed(spread(rows, group, placed), rows.local)
        else:
            flat = Shard((torch.Size(piece.shape).numel(), *inner), piece.start, tensor)
            found[key] = Exposed(spread(flat), tensor)
    count = torch.tensor([state.step], device=local(p).device)
    if group is None:
        found["step"] = Exposed(count, count)
    else:
        found["step"] = Exposed(spread(Shard((1,), 0, count, skip=1 if piece.start else 0), group), count)
    return found


def elsewhere(
    shape: tuple[int, ...],
    low_rank: tuple[dict[str, int], tuple[str, ...], dict[str, str]] | None,
    group: Any,
    compensated: bool = False,
    **kind: Any,
) -> dict[str, Exposed]:
    """As :func:`expose`, for what other ranks of ``group`` keep.

    Args:
        shape: of the parameter, or of a matrix of a stack.
        low_rank: ranks by moment, names of the statistics, and the factors' forms by moment, if it is low-rank.
        compensated: whether bits that its weights lack are kept.
        kind: dtype and device of the state.
    """
    shape = shape or (1,)
    shapes: dict[str, tuple[int, ...]] = {"exp_avg": shape, "exp_avg_sq": shape}
    own = str(kind["dtype"]).removeprefix("torch.")
    specs = of_vector(own)
    if low_rank is not None:
        ranks, statistics, forms = low_rank
        shapes = state_shapes((shape[0], shape[1]), ranks, statistics, forms)
        specs = of_matrix(ranks, statistics, own, forms)
    found = {}
    for key, size in shapes.items():
        dim, vectors = 1 if axis_of(key) is Axis.COLUMNS else 0, None if low_rank is None else _vectors(key)
        of = {**kind, "dtype": getattr(torch, specs[key].dtype)}
        nothing = torch.empty([0 if d == dim else n for d, n in enumerate(size)], **of)
        placed = spread(Shard(size, 0, nothing, dim), group, Split(0) if low_rank is None else None)
        found[key] = Exposed(placed, None, vectors)
    if compensated:
        nothing = torch.empty((0, *shape[1:], 2), dtype=torch.uint8, device=kind["device"])
        lies = Split(0) if low_rank is None else None
        found[COMPENSATION] = Exposed(spread(Shard((*shape, 2), 0, nothing), group, lies), None)
    none = torch.empty(0, dtype=torch.int64, device=kind["device"])
    found["step"] = Exposed(spread(Shard((1,), 0, none), group), None)
    return found


def _vectors(key: str) -> int | None:
    return {"A": -2, "B": -1}.get(key.rpartition("_")[2])


def spread(shard: Shard, group: Any = None, placement: Any = None) -> DTensor:
    """A shard as a DTensor over the ranks of ``group`` (None: it is known that not all of any group have it).

    Args:
        placement: what describes every rank's shard; None if nothing does.
    """
    kind = "cuda" if dist.get_backend(group) == "nccl" else shard.local.device.type
    world: Any = group or dist.group.WORLD
    mesh = DeviceMesh.from_group(world, kind)
    elements = shard.local
    if placement is None:
        placement = Split(shard.dim)
        first, last = column_block(shard.shape[shard.dim], mesh.size(), mesh.get_local_rank())
        size = tuple(last - first if d == shard.dim else n for d, n in enumerate(shard.shape))
        elements = Uneven(shard, size, group)
    shape = torch.Size(shard.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(elements, mesh, [placement], run_check=False, shape=shape, stride=stride)


def _rows(matrix: Matrix) -> Any:
    """How the rows of ``B`` lie on the ranks that share a matrix, in DTensor's words; None if it has none for it."""
    assert matrix.peers is not None
    (p, q), peers = matrix.interval.shape, matrix.peers
    wanted, lies = equal_ranges(p, len(peers.ranges)), peers.row_blocks((p, q))
    if not peers.deals_rows((p, q)):  # rows that are cut lie on several ranks
        wanted, lies = equal_ranges(p, len(peers.ranges), q), peers.ranges
    same = all(a == b or (a[0] == a[1] and b[0] == b[1]) for a, b in zip(lies, wanted, strict=True))
    return Split(0) if same else None


def _dim0(piece: Piece, elements: Tensor) -> Shard:
    """A piece of whole slices of dim 0, in the parameter's shape."""
    shape = piece.shape or (1,)
    inner, each = torch.Size(shape[1:]).numel(), elements.shape[1:]
    return Shard((*shape, *each), piece.start // inner, elements.view(-1, *shape[1:], *each))
