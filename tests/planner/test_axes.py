"""Plans of pipelines and tensor parallelism against real engines and meshes on four ranks, to the byte."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers import MixtralConfig

from lorapre_dist.cli import main
from lorapre_dist.config import ConfigError, LoRAPreConfig
from lorapre_dist.layouts.geometry.rows import split_dim
from lorapre_dist.planner import Request, Zero, plan
from lorapre_dist.planner.axes import axis_of
from lorapre_dist.planner.models import llama, load, parameters
from tests.covering import some
from tests.distributed.harness import run_ranks

from .axes_cases import CONFIG, EXPERTS, LENGTH, MICRO_BATCHES, PARAMS, axes_case, experts_case
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
    *(("zero1", 2, 1), ("zero1", 1, 2), ("zero2", 1, 2), ("zero0", 1, 2), ("zero1", 2, 2)),
    *(("fsdp2", 1, 2), ("fsdp2", 2, 1), ("fsdp2", 2, 2)),
]
SOME = [("zero0", 1, 2), ("zero2", 1, 2), ("zero1", 2, 2), ("fsdp2", 2, 2)]


@pytest.mark.parametrize("layout, stages, parts", some(CASES, SOME))
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


def test_experts_over_other_ranks_are_what_is_counted():
    request = Request(
        "small",
        parameters(MixtralConfig(**EXPERTS)),
        "fsdp2",
        4,
        "fp32",
        optimizer=LoRAPreConfig(**PARAMS),
        cpu=True,
        expert=2,
    )
    usage = plan(request, ("LoRAPre",))["LoRAPre"]
    for rank, counted in enumerate(run_ranks(4, experts_case)):
        check_pieces(request, rank, counted["pieces"])
        assert counted["state"] == usage.memory["state"][rank], rank
        assert counted["sent"] == {purpose: int(n[rank]) for purpose, n in usage.sent.items() if n[rank]}, rank


def test_what_ranks_hold_adds_up_over_all_axes():
    """AdamW's 8 bytes an element of what is split, and as often of the rest as there are tensor-parallel ranks."""
    model = load("llama-60m")
    split = sum(p.numel for p in model if split_dim(p.name, p.shape, head=True) is not None)
    whole = sum(p.numel for p in model) - split
    for stages, parts in ((4, 1), (1, 4), (2, 2), (4, 2)):
        request = Request("60m", model, "zero1", 16, pipeline=stages, tensor=parts, accumulation=4, seq_len=64)
        usage = plan(request, ("AdamW",))["AdamW"]
        assert usage.memory["state"].sum() == 8 * (split + parts * whole) and len(usage.total) == 16
        assert usage.stages == stages and usage.fullest in usage.fullest_of_stages
        assert request.bubble == (stages - 1) / (4 + stages - 1)
        assert [stage.in_flight for stage in request.stages] == [min(4, stages - k) for k in range(stages)]


def test_axes_of_the_json_and_of_the_command_line(tmp_path, capsys):
    config = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "LoRAPre", "params": {"lr": 0.01, "rank": 64}},
        "zero_optimization": {"stage": 1},
        "pipeline": {"stages": 2, "activation_checkpoint_interval": 1},
        "tensor_parallel": {"autotp_size": 2},
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = ["plan", "--model", "llama-60m", "--deepspeed_config", str(tmp_path / "ds.json"), "--seq_len", "128"]

    def planned(*more: str) -> Any:
        assert main([*command, "--world_size", "8", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    found = planned()
    assert found["axes"] == {"data": 2, "pipeline": 2, "tensor": 2} and found["accumulation"] == 8
    assert found["pipeline"]["bubble"] == 1 / 9 and len(found["pipeline"]["stages"]["LoRAPre"]) == 2
    assert "recomputed block by block" in " ".join(found["notes"])
    by_axis = found["optimizers"]["LoRAPre"]["sent_per_step"]["by_axis"]
    assert set(by_axis) == {"data", "tensor", "pipeline", "optimizer"} and all(n["largest"] for n in by_axis.values())
    assert planned("--tensor", "1")["axes"] == {"data": 4, "pipeline": 2}
    assert main([*command, "--world_size", "8"]) == 0
    out = capsys.readouterr().out
    assert "8 ranks = data 2 x pipeline 2 x tensor 2" in out and "(worst)" in out and "= 11.1% is bubble" in out
    assert "framework, pipeline      send activations" in out


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pipeline": 3}, "pipeline 3: 16 ranks are no multiple of 3"),
        ({"pipeline": 4, "tensor": 3}, "pipeline 4 x tensor 3: 16 ranks are no multiple of 12"),
        ({"pipeline": 2, "layout": "zero2"}, "pipeline 2: is planned for with zero0, zero1 or fsdp2, not zero2"),
        ({"tensor": 2, "layout": "ddp"}, "tensor 2: is planned for with zero0, zero1, zero2, zero3 or fsdp2, not ddp"),
        ({"pipeline": 16}, "pipeline 16: 11 layers are fewer than 16 stages"),
        ({"expert": 2}, "expert 2: is planned for with fsdp2, not zero1"),
        ({"expert": 2, "layout": "fsdp2"}, "expert 2: 60m has no experts in stacks; take 1"),
        ({"tensor": 0}, "tensor 0: must be at least 1"),
    ],
)
def test_refusals_are_one_clear_line(options, words):
    with pytest.raises(ConfigError) as caught:
        Request("60m", load("llama-60m"), **{"layout": "zero1", "world_size": 16, **options})
    assert str(caught.value) == words
