"""Another rank for saved factors: ``B A`` cut to its leading singular directions, or extended by zero ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.factors import initial_A
from ..core.quantized import converted, widened
from ..state.shards import OPTIMIZER, Shard, vector_dim
from . import dcp
from .entries import LowRank
from .team import Team


def resize(B: Tensor, A: Tensor, rank: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of rank ``rank`` whose product is the best approximation of ``B A`` (p x r times r x q).

    Where the rank grows, the product stays: new columns of ``B`` are zero and new rows of ``A`` are those of ``fresh``
    (rank x q), as at the start of training, in the size of A's, because from a zero row nothing could ever be learned.

    By QR of both factors and an SVD of r x r, in fp64: no p x q matrix is formed.
    """
    old = B.shape[1]
    if rank >= old:
        size = A.double().norm() / fresh[:old].double().norm()
        return torch.cat([B, B.new_zeros(B.shape[0], rank - old)], 1), torch.cat([A, (fresh[old:] * size).to(A)])
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, s, Vt = torch.linalg.svd(Rb @ Ra.T)
    root = s[:rank].sqrt()
    return (Qb @ U[:, :rank] * root).to(B.dtype), ((Qa @ Vt[:rank].T) * root).T.contiguous().to(A.dtype)


def load_resized(
    folder: Path, changed: dict[str, LowRank], shards: dict[str, Shard], options: dict[str, Any], team: Team
) -> None:
    """Fill the factors of ``changed`` (name to its entry in ``checkpoint.json`` here) from a checkpoint of other ranks.

    Rank 0 computes, one moment of one matrix at a time, and sends the result to all; each keeps its part. Collective.

    Args:
        options: ``init_std`` and ``seed`` of the optimizer.
    """
    saved = dcp.shapes(folder)
    for name, now in changed.items():
        for moment, rank in now.ranks.items():
            entries = [saved[f"{OPTIMIZER}{name}.{moment}_{factor}"] for factor in "BA"]
            p, q = now.shape
            dtype = torch.promote_types(entries[0].properties.dtype, torch.float32)
            new = [torch.empty(p, rank, dtype=dtype), torch.empty(rank, q, dtype=dtype)]
            with team.together(f"changing the rank of {name}"):
                if team.rank == 0:
                    key = f"{OPTIMIZER}{name}.{moment}"
                    B, A = (dcp.whole(folder, f"{key}_{f}", e) for f, e in zip("BA", entries, strict=True))
                    B, A = widened(B, -1, dtype), widened(A, -2, dtype)
                    fresh = initial_A(name, moment, rank, q, options["init_std"], options["seed"])
                    new = list(resize(B, A, rank, fresh))
            for factor, tensor in zip("BA", new, strict=True):
                mine = shards.get(f"{OPTIMIZER}{name}.{moment}_{factor}")
                whole = _to_all(tensor, team)
                if mine is not None:
                    part = whole.narrow(mine.dim, mine.start, mine.local.shape[mine.dim])
                    mine.local.copy_(converted(part, mine.local, vector_dim(mine.dim)))


def _to_all(tensor: Tensor, team: Team) -> Tensor:
    if team.size == 1:
        return tensor
    gpu = "nccl" in dist.get_backend(team.group)
    moved = tensor.contiguous().to(torch.device("cuda", torch.cuda.current_device()) if gpu else "cpu")
    world: Any = team.group or dist.group.WORLD
    dist.broadcast(moved, dist.get_global_rank(world, 0), group=team.group)
    return moved
