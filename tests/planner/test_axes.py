"""Plans of pipelines and tensor parallelism against real engines and meshes on four ranks, to the byte."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.planner import Request, Zero, plan
from lorapre_dist.planner.axes import axis_of
from lorapre_dist.planner.models import llama
from tests.distributed.harness import run_ranks

from .axes_cases import CONFIG, LENGTH, MICRO_BATCHES, PARAMS, axes_case
from .cases import BUCKET
from .test_counted import check_pieces

#: Numbers that frameworks exchange beside: norms, losses, whether a gradient is finite, shapes.
BESIDE = 64


def request_of(layout: str, world: int, stages: int, parts: int, **more: Any) -> Request:
    return Request(
        "small",
        llama(CONFIG),
        layout,
        world,
        "fp32",
        optimizer=LoRAPreConfig(**PARAMS),
        zero=Zero(reduce_bucket_size=BUCKET),
        cpu=True,
        accumulation=MICRO_BATCHES,
        seq_len=LENGTH,
        pipeline=stages,
        tensor=parts,
        **more,
    )


CASES = [
    *(("zero1", 2, 1), ("zero1", 1, 2), ("zero2", 1, 2), ("zero0", 1, 2)),
    *(("fsdp2", 1, 2), ("fsdp2", 2, 1), ("fsdp2", 2, 2)),
]


@pytest.mark.parametrize("layout, stages, parts", CASES)
def test_state_and_bytes_of_each_axis_are_what_is_counted(layout, stages, parts):
    request = request_of(layout, 4, stages, parts)
    usage = plan(request, ("LoRAPre",))["LoRAPre"]
    inside, size = 4 // stages, len(usage.total) // stages
    for rank, counted in enumerate(run_ranks(4, axes_case, timeout=300, layout=layout, stages=stages, parts=parts)):
        stage, place = divmod(rank, inside)
        at = stage * size + place % size
        check_pieces(request.stages[stage], place, counted["pieces"])
        assert counted["state"] == usage.memory["state"][at], rank
        assert counted["sent"] == {purpose: int(n[at]) for purpose, n in usage.sent.items() if n[at]}, rank
        planned = Counter[tuple[str, str]]()
        for purpose, sent in usage.frame_sent.items():
            planned[axis_of(purpose), purpose.split()[0]] += int(np.broadcast_to(sent, usage.total.shape)[at])
        assert {axis for axis, _ in planned} == {*request.axis_sizes, *(["data"] if stages * parts < 4 else [])}
        for key in planned.keys() | counted["frame_sent"].keys():
            assert 0 <= counted["frame_sent"].get(key, 0) - planned[key] <= BESIDE, (rank, key, planned, counted)
