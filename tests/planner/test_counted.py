"""Geometry and plan of all five optimizers against real engines and meshes, on 1 to 4 ranks, and on 16.

What the layouts read of DeepSpeed's and PyTorch's objects is what the geometry says; state, bytes sent and flops are
the plan's, to the byte, on every rank.
"""

from __future__ import annotations

from typing import Any

import pytest

from lorapre_dist.config import CONFIGS
from lorapre_dist.core import arithmetic
from lorapre_dist.core.batching import Limits
from lorapre_dist.core.rules import needs as rules
from lorapre_dist.planner import Request, Zero, plan
from lorapre_dist.planner.arrange import arranged
from lorapre_dist.planner.models import parameters
from lorapre_dist.planner.ours import divided, held
from tests.covering import some
from tests.distributed.harness import close_pools, run_ranks

from .cases import BUCKET, config_of
from .counting import SHARD_SIZE, counted_case

OPTIONS: dict[str, dict[str, Any]] = {
    "LoRAPre": {"lr": 1e-3, "rank": 8, "rank_v": 3},
    "LoRAPreMuon": {"lr": 1e-3, "rank": 8},
    "LoRAPreSGD": {"lr": 1e-3, "rank": 5, "variant": "paper"},
    "LoRAPreLion": {"lr": 1e-3, "rank": 4, "other_state": "adamw8bit"},
    "LoRAPreAdafactor": {"lr": 1e-3, "rank": 8},
}
ZERO3 = {"sub_group_size": 20_000}
NATIVE = ("fsdp1", "fsdp2", "hsdp", "tp", "ddp")
CASES = [(layout, world) for layout in ("zero2", "zero3", *NATIVE) for world in (1, 2, 3, 4)]
CASES += [("zero0", 2), ("zero1", 3)]
# Of each layout one that cuts unevenly, and the most ranks.
SOME = [(layout, world) for layout, world in CASES if world in (3, 4) or layout in ("zero0", "fsdp2")]
# With so many, some have nothing of a matrix.
SIXTEEN = [(layout, 16) for layout in ("zero1", "zero2", "zero3", "fsdp1", "fsdp2", "hsdp", "tp")]
MANY = [*SIXTEEN, *((layout, 64) for layout in ("zero2", "zero3", "fsdp2", "tp"))]


def request_of(
    kind: str, layout: str, world: int, model: str = "llama", options: dict[str, Any] | None = None, **more: Any
) -> Request:
    zero = Zero(reduce_bucket_size=BUCKET, **(ZERO3 if layout == "zero3" else {}))
    return Request(
        "small",
        parameters(config_of(model)),
        layout,
        world,
        "fp32",
        optimizer=CONFIGS[kind](**OPTIONS[kind], **(options or {})),
        zero=zero,
        cpu=True,
        shard_size=SHARD_SIZE[world],
        **more,
    )


def pieces(request: Request, rank: int) -> dict[str, dict[str, Any]]:
    """What the geometry says that a rank holds, by name."""
    arrangement, found = arranged(request), {}
    at = rank % arrangement.size
    for share in arrangement.shares:
        if at in share.ranks:
            index = list(share.ranks).index(at) if share.shared else 0
            start, stop = share.ranges[index]
            peers = {
                "ranges": share.ranges,
                "columns": share.columns,
                "index": index,
                "turn": share.turn,
            }
            found[share.name] = {
                "shape": share.shape,
                "start": start,
                "stop": stop,
                "columns": share.columns and share.columns[index],
                "before": share.before,
                "peers": peers if share.shared else None,
            }
    return found


def check_pieces(request: Request, rank: int, read: list[dict[str, Any]]) -> None:
    wanted = pieces(request, rank)
    names = {piece["name"] for piece in read if piece["owned"] and piece["start"] < piece["stop"]}
    assert names == {n for n, p in wanted.items() if p["start"] < p["stop"]}
    for piece in read:
        if not piece["owned"] or piece["name"] not in wanted:
            continue
        one = wanted[piece["name"]]
        if piece["peers"] is None and piece["columns"] == (0, piece["shape"][-1]):
            piece["columns"] = None  # split by columns over one rank: all of them
        matrix = request.takes(piece["name"], piece["shape"])
        for key in ("shape", "start", "stop", "columns", *(["before"] if matrix and one["peers"] else [])):
            assert piece[key] == one[key], (piece, one)
        if matrix:
            there = piece["peers"] and {key: piece["peers"][key] for key in ("ranges", "columns", "index", "turn")}
            assert there == one["peers"], piece["name"]


def check_flops(request: Request, rank: int, flops: int) -> None:
    arrangement, needs = arranged(request), rules.of(request.optimizer)
    at = rank % arrangement.size
    limits = Limits.of(needs.sizes, "cpu", needs.per_element * 4)
    steps = [held(request, arrangement, [at])[at]]
    if request.optimizer.work == "matrices":
        _, steps = divided(steps[0], needs.sizes, "cpu")
    stable = request.optimizer.variant == "stable"
    assert sum(arithmetic.of_step(mine, needs, limits, stable, "cpu").products for mine in steps) == flops


def check(layout: str, world: int, options: dict[str, Any] | None = None, **arguments: Any) -> None:
    """Every optimizer on every rank; ``options`` are of all of them."""
    zero, each = ZERO3 if layout == "zero3" else {}, {kind: own | (options or {}) for kind, own in OPTIONS.items()}
    ranks = run_ranks(world, counted_case, timeout=300, layout=layout, options=each, zero=zero, **arguments)
    for kind in OPTIONS:
        request = request_of(kind, layout, world, options=options, **arguments)
        usage = plan(request, (kind,))[kind]
        for rank, counted in enumerate(found[kind] for found in ranks):
            at, where = rank % len(usage.total), (kind, layout, world, rank)
            assert counted["state"] == usage.memory["state"][at], where
            sent = {purpose: int(n[at]) for purpose, n in usage.sent.items() if n[at]}
            assert counted["sent"] == sent, where
            bound, said = usage.memory["workspace"][at], counted["workspace"]
            assert said <= bound <= 1.05 * said, where  # where all are alike that of the fullest rank
            check_pieces(request, rank, counted["pieces"])
            check_flops(request, rank, counted["flops"])


@pytest.mark.parametrize("layout, world", some(CASES, SOME))
def test_geometry_and_plan_are_what_is_read_and_counted(layout, world):
    check(layout, world)


@pytest.fixture(scope="module")
def many_ranks():
    """They end with the last test of this file: 16 take more than a GiB."""
    yield
    close_pools()


@pytest.mark.slow
@pytest.mark.usefixtures("many_ranks")
@pytest.mark.parametrize("layout, world", some(MANY, SIXTEEN))
def test_on_many_ranks(layout, world):
    check(layout, world)


@pytest.mark.parametrize(
    "layout, world", [("zero2", 3), ("zero3", 4), ("fsdp1", 3), ("fsdp2", 4), ("hsdp", 4), ("tp", 3)]
)
def test_steps_by_matrices(layout, world):
    check(layout, world, options={"work": "matrices"})


@pytest.mark.parametrize("layout", ["zero2", "zero3", "fsdp2", "ddp"])
def test_stacks_of_matrices(layout):
    check(layout, 3, model="mixtral")


def test_ddp_without_sharded_state():
    check("ddp", 2, shard_state=False)
