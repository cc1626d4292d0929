"""Matrices are shared by any ranks, in any order; groups of ranks train side by side, each by itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lorapre_dist import LoRAPre
from lorapre_dist.core.comm import Comm
from lorapre_dist.core.interval import Peers
from lorapre_dist.layouts.base import Layout, Piece, Unit
from lorapre_dist.layouts.groups import connect
from tests import oracle

from .harness import run_ranks
from .native_cases import OPTIONS, Net, batch_of, dense_path, shard

PAIRS = [(0, 1), (1, 2), (0, 2)]


def pairs_case(rank: int, world_size: int) -> dict[tuple[int, ...], float]:
    """Each pair of ranks shares a matrix; every rank has its own order, the last one has none but shared ones."""
    pairs = [pair for pair in PAIRS[rank:] + PAIRS[:rank] if rank in pair]
    pieces = [
        Piece(f"m{pair}", (2, 3), 3 * pair.index(rank), 3, 0, Peers(pair, ((0, 3), (3, 6)), pair.index(rank)))
        for pair in pairs
    ]
    whole = [] if rank == 2 else [Piece(f"own{k}", (2, 3), 0, 6, 0) for k in range(rank + 1)]
    layout = Layout("test", [Unit(torch.zeros(6), 0, [piece]) for piece in whole + pieces], world_size)
    connect(layout)
    waits = {}
    for unit in layout.units:
        for piece in unit.pieces:
            if piece.peers is not None:
                group = piece.peers.group
                waits[tuple(dist.get_process_group_ranks(group))] = Comm().all_reduce(torch.ones(1) * rank, group, "")
    return {ranks: float(wait()) for ranks, wait in waits.items()}


def test_groups_are_made_in_whatever_order_ranks_ask_for_them():
    results = run_ranks(3, pairs_case)
    for rank, found in enumerate(results):
        assert found == {pair: float(sum(pair)) for pair in PAIRS if rank in pair}


def side_by_side_case(rank: int, world_size: int) -> tuple[float, int]:
    """Two ranks train under FSDP2, the third by itself and other steps; distance to the reference and collectives."""
    meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2])]
    mesh = meshes[rank // 2]
    model = shard(Net(torch.float64), mesh)
    optimizer = LoRAPre(model.named_parameters(), **OPTIONS["LoRAPre"])
    steps = 5 + rank // 2
    for step in range(steps):
        optimizer.zero_grad()
        model(batch_of(step, torch.float64)).backward()
        optimizer.step()
    want = dense_path(steps, "LoRAPre", OPTIONS["LoRAPre"])
    got = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    return max(float((got[n] - want[n]).norm() / want[n].norm()) for n in want), sum(optimizer.comm.calls.values())


def test_groups_train_side_by_side():
    *pair, alone = run_ranks(3, side_by_side_case)
    assert all(error <= 1e-10 and calls for error, calls in pair)
    assert alone[0] <= 1e-10 and alone[1] == 0


def ragged_case(rank: int, world_size: int) -> float:
    """Ranks of a mesh whose second dimension alone shares; the first one has more matrices than the second."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    shapes = {f"layers.{k}.q_proj.weight": (7, 5 + k) for k in range(4)}
    mine = dict(list(shapes.items())[slice(0, 3) if mesh.get_local_rank("pp") == 0 else slice(3, 4)])
    weights = {n: torch.linspace(-1, 1, p * q, dtype=torch.float64).view(p, q) for n, (p, q) in mine.items()}
    spread = {
        n: nn.Parameter(dist.tensor.distribute_tensor(w.clone(), mesh["dp"], [dist.tensor.Shard(0)]))
        for n, w in weights.items()
    }
    optimizer = LoRAPre(list(spread.items()), lr=0.01, rank=2)
    state = oracle.init(weights, optimizer.config, lambda _, p: True)
    for step in range(3):
        grads = {n: (w + 0.1 * step).sin() for n, w in weights.items()}
        for n, p in spread.items():
            p.grad = dist.tensor.distribute_tensor(grads[n], mesh["dp"], [dist.tensor.Shard(0)])
        optimizer.step()
        oracle.step(weights, grads, state, optimizer.config)
    full = optimizer.full_state_dict()
    assert rank or full.keys() == shapes.keys()
    return max(float((p.full_tensor() - weights[n]).norm() / weights[n].norm()) for n, p in spread.items())


def test_ranks_may_have_different_numbers_of_matrices():
    assert max(run_ranks(4, ragged_case)) <= 1e-10
