"""What this rank holds of every tensor: weights and optimizer state by name, each as a run along one dimension.

Names are ``model.NAME`` for the weights that are stepped (fp32 masters where there are some) and ``untrained.NAME`` for
the model's other tensors, 1-D in row-major order; and ``optimizer.NAME.KEY`` for the state: ``m_B`` (p x r), ``m_A``
(r x q), ``v_B``, ``v_A``, ``rms_row`` (p), ``rms_col`` (q), or ``exp_avg`` and ``exp_avg_sq`` (1-D); and, where weights
are kept so, ``compensation`` (two bytes an element: elements x 2). Every layout holds a run of each, so one form serves
them all; a matrix that is split by columns is brought into rows, and back after loading. Factors are saved as they are
kept: in bf16, or in 8 bits with the scales behind (``core/forms.py``); what was saved otherwise is converted when it is
loaded. Of AdamW's moments in 8 bits there are codes, ``exp_avg_8bit`` and ``exp_avg_sq_8bit`` (1-D, a byte an element),
and the rows' scales, ``exp_avg_row`` and ``exp_avg_sq_row`` (p).

A :class:`Shard` has the three methods by which ``torch.distributed.checkpoint`` saves and reshards a DTensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..config import ConfigError
from ..config.param_groups import parameter_name
from ..core.comm import Comm
from ..core.factors import Matrix
from ..core.interval import column_block
from ..core.quantized import converted, form_of
from ..core.spec import Axis, axis_of
from ..core.transfer import Rectangle, Transfer
from ..layouts.base import Piece, Unit, local
from ..layouts.geometry.ranges import expert_name

MODEL, UNTRAINED, OPTIMIZER = "model.", "untrained.", "optimizer."


@dataclass
class Shard:
    """Elements ``[start, start + n)`` along ``dim`` of a tensor of ``shape``; ``local`` holds them.

    Attributes:
        skip: leading elements along ``dim`` that another rank writes (a row cut between ranks is held by each).
        home: what ``local`` is a copy of, if it is one: a tensor whose elements do not lie in row-major order, a
            DTensor split inside its rows or slices, a piece of some columns, or a factor that is kept in another form.
        rows: what is brought to a DTensor, where ``local`` is a part of that: all slices of dim 0 that are here.
    """

    shape: tuple[int, ...]
    start: int
    local: Tensor
    dim: int = 0
    skip: int = 0
    home: Tensor | Columns | None = None
    rows: Tensor | None = None

    @property
    def owned(self) -> Tensor:
        """The part that this rank writes; replicas all name the same part."""
        return self.local.narrow(self.dim, self.skip, self.local.shape[self.dim] - self.skip)

    def leave_to_others(self) -> None:
        """Write nothing of it: ranks beside those that share it do."""
        self.skip = self.local.shape[self.dim]

    def offsets(self, skip: int = 0) -> torch.Size:
        """Where ``local``, without ``skip`` elements, begins in the whole tensor."""
        return torch.Size(self.start + skip if d == self.dim else 0 for d in range(len(self.shape)))

    def size(self) -> torch.Size:
        """The whole tensor's."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        owned = self.owned
        if owned.numel() == 0:
            return []
        offsets = self.offsets(self.skip)
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, owned.shape), TensorProperties.create_from_tensor(owned), self.size()
        )
        return [WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offsets(), self.local.shape)] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local if index.offset == self.offsets() else self.owned

    def bring_home(self) -> None:
        """Copy what was loaded into ``local`` to where it belongs; a collective if that is split inside."""
        if isinstance(self.home, DTensor):
            mesh, placements = self.home.device_mesh, _row_wise(self.home)
            rows = (self.local if self.rows is None else self.rows).view(-1, *self.home.shape[1:])
            shape, stride = self.home.shape, self.home.stride()
            loaded = DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)
            self.home.to_local().copy_(loaded.redistribute(placements=self.home.placements).to_local())
        elif isinstance(self.home, Columns):
            self.home.fill(self.local)
        elif self.home is not None and self.home.dtype != self.local.dtype:
            self.home.copy_(converted(self.local, self.home, vector_dim(self.dim)))
        elif self.home is not None:
            self.home.copy_(self.local.view(self.home.shape))

    def saved_as(self, shape: tuple[int, ...], dtype: torch.dtype) -> Shard:
        """A shard to load into of a factor that was saved in another form: of ``shape`` as a whole, and ``dtype``."""
        size = [n if d == self.dim else shape[d] for d, n in enumerate(self.local.shape)]
        local = torch.empty(size, dtype=dtype, device=self.local.device)
        return Shard(shape, self.start, local, self.dim, self.skip, home=self.local)


def vector_dim(dim: int) -> int:
    """Along which dimension a factor's vectors lie that is split along ``dim``."""
    return -1 if dim == 0 else -2


def in_other_form(key: str, dtype: torch.dtype, held: Tensor) -> bool:
    """Whether a tensor of the state is a factor that was saved, as ``dtype``, in another form than it is kept in."""
    return key.endswith(("_A", "_B")) and form_of(torch.empty(0, dtype=dtype)) != form_of(held)


@torch.no_grad()
def bring_home(shards: dict[str, Shard]) -> None:
    """Bring all that was loaded to where it belongs; a collective where some is split inside."""
    for shard in shards.values():
        shard.bring_home()


def _row_wise(tensor: DTensor) -> list[Any]:
    return [Split(0) if hasattr(placement, "dim") else placement for placement in tensor.placements]


def flat_shard(tensor: DTensor, ndim: int = 2) -> Shard:
    """This rank's share, as one run, of a tensor split inside its rows; a collective, of as many bytes as it has.

    Args:
        ndim: of the parameter; beyond them ``tensor`` has some numbers for each of its elements.
    """
    first, rows = _in_rows(tensor)
    size, inner, each = tensor.shape[0], tensor.shape[1:ndim].numel(), tensor.shape[ndim:]
    return Shard((size * inner, *each), min(first, size) * inner, rows.view(-1, *each), home=tensor.detach())


def stack_shards(name: str, tensor: DTensor) -> dict[str, Shard]:
    """The same of a stack whose matrices are split by columns, by the matrices' names: whole ones, on some ranks."""
    first, rows = _in_rows(tensor)
    inner, home = tensor.shape[1:].numel(), tensor.detach()
    found = {expert_name(name, first + k): Shard((inner,), 0, part.view(-1)) for k, part in enumerate(rows)}
    if not found:  # which takes part in what is done with all of them
        found[expert_name(name, 0)] = Shard((inner,), 0, rows.view(-1))
    one = next(iter(found.values()))
    one.home, one.rows = home, rows
    return found


def _in_rows(tensor: DTensor) -> tuple[int, Tensor]:
    """A DTensor spread by slices of dim 0 alone: the first one here, and those that are; a collective."""
    placements = _row_wise(tensor)
    moved: Any = tensor.detach().to(tensor.device_mesh.device_type)
    rows = moved.redistribute(placements=placements)
    _, (first, *_) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    return first, rows.to_local().contiguous()


@dataclass
class Columns:
    """Elements (1-D) of some columns of a matrix, and how they become a share of whole rows, and come back."""

    elements: Tensor
    shape: tuple[int, int]
    transfer: Transfer
    group: Any

    def as_rows(self) -> Shard:
        """This rank's share of the matrix as one run; a collective over those that share it."""
        block = self.elements.new_empty(self.transfer.mine.shape)
        self._move(self.transfer.in_piece, self.elements, self.transfer.in_target, block)
        p, q = self.shape
        return Shard((p * q,), min(p, self.transfer.mine.row) * q, block.view(-1), home=self)

    def fill(self, rows: Tensor) -> None:
        """Take the elements from this rank's share of whole rows; a collective."""
        block = rows.view(self.transfer.mine.shape)
        self._move(self.transfer.in_target, block, self.transfer.in_piece, self.elements)

    def _move(self, leaving: Any, source: Tensor, arriving: Any, target: Tensor) -> None:
        ranks = range(len(self.transfer.targets))
        sent = [[source.new_empty(0), *leaving(source, k)] for k in ranks]
        Comm().all_to_all(sent, [arriving(target, k) for k in ranks], self.group, "columns")()


def column_shard(piece: Piece, elements: Tensor) -> Shard:
    """This rank's share, as one run, of a matrix of which ranks hold some columns, here ``elements``; a collective."""
    (p, q), peers = piece.shape, piece.peers
    if peers is None:
        raise ConfigError(f"{piece.name}: columns {piece.columns} of it on one rank alone cannot be saved")
    if elements.ndim > 1:
        raise ConfigError(f"{piece.name}: weights='kahan' of a matrix that is split by columns cannot be saved")
    rows = [column_block(p, len(peers.ranges), k) for k in range(len(peers.ranges))]
    transfer = Transfer(peers, (p, q), [Rectangle(*held, 0, q) for held in rows])
    return Columns(elements, (p, q), transfer, peers.group).as_rows()


def like(parameter: DTensor, elements: Tensor) -> DTensor:
    """A DTensor placed as ``parameter``, of this rank's ``elements`` of it (n, or n x numbers of each)."""
    inner = elements.shape[1:]
    shape = torch.Size((*parameter.shape, *inner))
    return DTensor.from_local(
        elements.view((*local(parameter).shape, *inner)),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def weight_shards(units: Iterable[Unit]) -> dict[str, Shard]:
    """The weights of a layout's units; a collective where some are split inside their rows or slices."""
    found = {}
    for unit in units:
        if isinstance(unit.tensor, DTensor) and any(piece.split_inside for piece in unit.pieces):
            name, ndim = parameter_name(unit.pieces[0].name), unit.tensor.ndim
            if len(unit.pieces[0].shape) < ndim:
                found.update({MODEL + n: shard for n, shard in stack_shards(name, unit.tensor).items()})
            else:
                found[MODEL + name] = flat_shard(unit.tensor, ndim)
            continue
        tensor = local(unit.tensor).detach()
        flat = tensor.contiguous().view(-1)
        inner = tensor.shape[1:].numel()
        runs: dict[str, tuple[int, int, int]] = {}  # whole on each rank of DDP, though stepped in pieces
        for piece in unit.pieces:
            start, _, offset = runs.get(piece.name, (piece.start, piece.stop, piece.offset))
            runs[piece.name] = start, piece.stop, offset
        shapes = {piece.name: (torch.Size(piece.shape).numel(),) for piece in unit.pieces}
        split = {piece.name: piece for piece in unit.pieces if piece.columns is not None}
        for name, piece in split.items():
            found[MODEL + name] = column_shard(piece, flat[piece.offset : piece.offset + piece.numel])
        for name, (start, stop, offset) in runs.items():
            if name in split:
                continue
            end = offset + stop - start
            # What is not contiguous is no flat buffer: whole slices of dim 0 lie in it.
            home = None if tensor.is_contiguous() else tensor[offset // inner : end // inner]
            found[MODEL + name] = Shard(shapes[name], start, flat[offset:end], home=home)
        for piece in unit.pieces:
            if piece.replica:
                found[MODEL + piece.name].leave_to_others()
    return found


@dataclass
class Untrained:
    """A tensor of the model that is not stepped (frozen, or a buffer): its shape, and this rank's run of it, 1-D."""

    shape: tuple[int, ...]
    shard: Shard


def state_shards(held: Iterable[tuple[Any, Any]]) -> dict[str, Shard]:
    """The state of this rank's ``(piece, state)`` pairs."""
    found = {}
    for piece, state in held:
        shards = {**(matrix_shards(state) if isinstance(state, Matrix) else {}), **_element_shards(piece, state)}
        for shard in shards.values() if piece.replica else ():
            shard.leave_to_others()
        found.update({f"{OPTIMIZER}{piece.name}.{key}": shard for key, shard in shards.items()})
    return found


def matrix_shards(matrix: Matrix) -> dict[str, Shard]:
    """Rows of ``B`` (and of the energies) and columns of ``A`` that this rank holds of one matrix."""
    p, q = matrix.interval.shape
    first = 0 if matrix.peers is None else min(q, matrix.peers.index * matrix.block_size)
    found = {}
    for key, tensor in matrix.low_rank_tensors().items():
        axis = axis_of(key)
        if axis is Axis.COLUMNS:
            found[key] = Shard((tensor.shape[0], q), first, tensor, dim=1)
        elif axis is Axis.ALL_COLUMNS:
            found[key] = Shard((q,), 0, tensor)
        else:
            found[key] = Shard((p, *tensor.shape[1:]), matrix.kept_rows[0], tensor, skip=matrix.first_counted)
    return found


def elementwise(state: Any) -> dict[str, Tensor]:
    """The tensors of a piece's state that have a number, or two bytes, for each of its elements: n, or n x 2."""
    found: dict[str, Tensor] = state.elementwise() if isinstance(state, Matrix) else state.tensors()
    return found


def _element_shards(piece: Any, state: Any) -> dict[str, Shard]:
    if piece.columns is not None and piece.parameter is None:
        return {key: column_shard(piece, tensor) for key, tensor in elementwise(state).items()}
    if piece.split_inside:
        ndim = len(piece.shape)
        return {key: flat_shard(like(piece.parameter, tensor), ndim) for key, tensor in elementwise(state).items()}
    numel = torch.Size(piece.shape).numel()
    return {key: Shard((numel, *tensor.shape[1:]), piece.start, tensor) for key, tensor in elementwise(state).items()}
