"""What this rank holds of every tensor: weights and optimizer state by name, each as a run along one dimension.

Names are ``model.NAME`` for the weights that are stepped (fp32 masters where there are some) and ``untrained.NAME`` for
the model's other tensors, 1-D in row-major order; and ``optimizer.NAME.KEY`` for the state: ``m_B`` (p x r), ``m_A``
(r x q), ``v_B``, ``v_A``, ``v_row`` (p), ``v_col`` (q), or ``exp_avg`` and ``exp_avg_sq`` (1-D). Every layout holds a
run of each, so one form serves them all.

A :class:`Shard` has the three methods by which ``torch.distributed.checkpoint`` saves and reshards a DTensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .config import ConfigError
from .core.factors import Matrix
from .layouts.base import Unit, local

MODEL, UNTRAINED, OPTIMIZER = "model.", "untrained.", "optimizer."


@dataclass
class Shard:
    """Elements ``[start, start + n)`` along ``dim`` of a tensor of ``shape``; ``local`` holds them.

    Attributes:
        skip: leading elements along ``dim`` that another rank writes (a row cut between ranks is held by each).
    """

    shape: tuple[int, ...]
    start: int
    local: Tensor
    dim: int = 0
    skip: int = 0

    @property
    def owned(self) -> Tensor:
        """The part that this rank writes; replicas all name the same part."""
        return self.local.narrow(self.dim, self.skip, self.local.shape[self.dim] - self.skip)

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

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.owned


@dataclass
class Weights:
    """Shards of the stepped tensors.

    Attributes:
        copies: (tensor, flat copy) where a tensor's elements do not lie in row-major order.
    """

    shards: dict[str, Shard] = field(default_factory=dict)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, units: Iterable[Unit]) -> Weights:
        """The weights of a layout's units."""
        weights = cls()
        for unit in units:
            tensor = local(unit.tensor).detach()
            flat = tensor.contiguous().view(-1)
            if not tensor.is_contiguous():
                weights.copies.append((tensor, flat))
            runs: dict[str, tuple[int, int, int]] = {}  # whole on each rank of DDP, though stepped in pieces
            for piece in unit.pieces:
                if piece.columns is not None:
                    raise ConfigError(f"{piece.name}: checkpoints of matrices split by columns are not supported")
                start, _, offset = runs.get(piece.name, (piece.start, piece.stop, piece.offset))
                runs[piece.name] = start, piece.stop, offset
            shapes = {piece.name: (torch.Size(piece.shape).numel(),) for piece in unit.pieces}
            for name, (start, stop, offset) in runs.items():
                weights.shards[MODEL + name] = Shard(shapes[name], start, flat[offset : offset + stop - start])
        return weights

    @torch.no_grad()
    def write_back(self) -> None:
        """Bring what was loaded into ``copies`` to the tensors themselves."""
        for tensor, flat in self.copies:
            tensor.copy_(flat.view(tensor.shape))


@dataclass
class Untrained:
    """A tensor of the model that is not stepped (frozen, or a buffer): its shape, and this rank's run of it, 1-D."""

    shape: tuple[int, ...]
    shard: Shard


def state_shards(held: Iterable[tuple[Any, Any]]) -> dict[str, Shard]:
    """The state of this rank's ``(piece, state)`` pairs."""
    found = {}
    for piece, state in held:
        shards = matrix_shards(state) if isinstance(state, Matrix) else _vector_shards(piece, state)
        found.update({f"{OPTIMIZER}{piece.name}.{key}": shard for key, shard in shards.items()})
    return found


def matrix_shards(matrix: Matrix) -> dict[str, Shard]:
    """Rows of ``B`` (and of the energies) and columns of ``A`` that this rank holds of one matrix."""
    (p, q), interval = matrix.interval.shape, matrix.interval
    first = 0 if matrix.peers is None else min(q, matrix.peers.index * matrix.block_size)
    found = {}
    for key, tensor in matrix.tensors().items():
        if key.endswith("_A"):
            found[key] = Shard((tensor.shape[0], q), first, tensor, dim=1)
        elif key.endswith("_col"):
            found[key] = Shard((q,), 0, tensor)
        else:
            found[key] = Shard((p, *tensor.shape[1:]), interval.first_row, tensor, skip=interval.first_owned)
    return found


def _vector_shards(piece: Any, vector: Any) -> dict[str, Shard]:
    numel = torch.Size(piece.shape).numel()
    return {key: Shard((numel,), piece.start, tensor) for key, tensor in vector.tensors().items()}
