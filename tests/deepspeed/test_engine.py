"""Around the step: state per rank, collectives, refusals, and a real Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import lorapre_dist
from lorapre_dist.config import LoRAPreConfig
from tests import oracle
from tests.distributed.harness import run_ranks
from tests.shapes import projections, state_bytes

from .cases import PARAMS, build, ds_config, equality_case, full_parameters, merge, worst


class Lookup(torch.nn.Module):
    """A block with a projection, and with an embedding whose name does not tell that it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.places = torch.nn.Linear(8, 16), torch.nn.Embedding(12, 8)


def types_case(rank: int, world_size: int, *, stage: int) -> list[set[str]]:
    """What is low-rank on this rank by the JSON, and if the caller builds the optimizer of the model."""
    config, found = ds_config(stage, "fp32", 1, 0.0, PARAMS), []
    for client in (False, True):
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Lookup()])})
        options = {k: v for k, v in config.items() if k != "optimizer"} if client else config
        optimizer = lorapre_dist.LoRAPre(model, **PARAMS) if client else None
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]
        found.append(set(lorapre_dist.deepspeed.base_optimizer(engine).factors()))
        engine.destroy()
    return found


class Projections(torch.nn.Module):
    """The projections of a model preset and nothing else."""

    def __init__(self, shapes: list[tuple[str, tuple[int, int]]]) -> None:
        super().__init__()
        for name, shape in shapes:
            parent: torch.nn.Module = self
            *path, _ = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.register_parameter("weight", torch.nn.Parameter(torch.zeros(shape)))


def state_bytes_case(rank: int, world_size: int, *, model: str, lora_rank: int) -> tuple[int, int, int]:
    """Bytes of the tensors that a rank really holds under ZeRO-3, those reported, and elements of weights."""
    config = ds_config(3, "fp32", 1, 0.0, {"lr": 1e-3, "rank": lora_rank})
    del config["zero_optimization"]["sub_group_size"]
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = Projections(projections(model))
    engine = lorapre_dist.initialize(model=module, config=config)[0]
    base = lorapre_dist.deepspeed.base_optimizer(engine)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for tensors in base.factors().values()
        for t in tensors.values()
    }
    report = base.memory_report()
    engine.destroy()
    dist.barrier()
    return sum(held.values()), report.state_bytes, report.matrix_elements


def refused_case(rank: int, world_size: int, *, changes: dict[str, Any], params: dict[str, Any], door: str) -> str:
    """What building an engine from a bad configuration raises."""
    stage = changes.get("zero_optimization", {}).get("stage", 2)
    try:
        build(merge(ds_config(stage, "fp32", 1, 0.0, {**PARAMS, **params}), changes), door).destroy()
    except lorapre_dist.ConfigError as error:
        return str(error)
    return "accepted"


def buffers_case(rank: int, world_size: int) -> list[str]:
    """The buffers of DeepSpeed's ranks that are mapped here."""
    deepspeed.init_distributed(verbose=False)
    dist.barrier()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if "deepspeed_allreduce_buffer" in line})


def llama_case(rank: int, world_size: int, *, stage: int, steps: int) -> tuple[float, str, float]:
    """A real Llama with a real loss, each rank on its own batch, against autograd and the reference on one process."""
    shape = LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=61,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    batches = [torch.randint(61, (world_size, 2, 16), generator=torch.Generator().manual_seed(s)) for s in range(steps)]

    def model() -> torch.nn.Module:
        torch.manual_seed(5)
        return LlamaForCausalLM(shape)

    options = {**PARAMS, "lr": 1e-3, "target_modules": ["self_attn", "mlp"]}
    config = ds_config(stage, "fp32", 1, 1.0, options)
    engine = lorapre_dist.initialize(model=model(), config=config)[0]
    for batch in batches:
        engine.backward(engine(input_ids=batch[rank], labels=batch[rank]).loss)
        engine.step()
    got = full_parameters(engine)
    engine.destroy()
    dist.barrier()

    settings, single = LoRAPreConfig(**options), model().double()
    named = dict(single.named_parameters())
    theta = {n: p.data for n, p in named.items()}
    state = oracle.init(theta, settings, lambda n, _: "proj" in n)
    for batch in batches:
        single.zero_grad()
        loss = sum(single(input_ids=part, labels=part).loss for part in batch) / world_size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        oracle.step(theta, {n: p.grad for n, p in named.items()}, state, settings)
    error, name = worst(got, theta)
    return error, name, float(loss)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_state_per_rank_under_zero3(world):
    """Llama-60M's matrices at rank 128: within 2% of 4 ((r + r_v)(p + q) + p) / N bytes on every rank."""
    shapes = [shape for _, shape in projections("llama-60m")]
    want = state_bytes("llama-60m", 128, 16) / world
    for held, reported, elements in run_ranks(world, state_bytes_case, model="llama-60m", lora_rank=128):
        assert held == reported
        assert abs(held - want) <= 0.02 * want
        assert elements <= -(-sum(p * q for p, q in shapes) // world) + len(shapes)


def test_no_collective_for_matrices_owned_whole():
    """ZeRO-0, and any stage on one rank: no collective. ZeRO-2: only the ranks that share a matrix talk about it."""
    for world, stage in ((2, 0), (1, 2), (1, 3)):
        for result in run_ranks(world, equality_case, stage=stage, precision="fp32", combos=[(1, 0.0)], steps=3):
            assert result[0]["calls"] == {}
    steps = 3
    for result in run_ranks(2, equality_case, stage=2, precision="fp32", combos=[(1, 0.0)], steps=steps):
        # One matrix lies across the boundary of two partitions: seven collectives a step.
        solves = ("reduce Gram of B", "send inverse of B", "reduce Gram of A", "send gauge")
        assert result[0]["calls"] == dict.fromkeys(("gather A", "edge rows", "reduce Z", *solves), steps)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_engine_knows_the_types_of_layers(stage):
    for doors in zip(*run_ranks(2, types_case, stage=stage), strict=True):
        assert set.union(*doors) == {"layers.0.up.weight"}


@pytest.mark.parametrize("door", ["lorapre", "deepspeed"])
@pytest.mark.parametrize(
    "changes, params, words",
    [
        ({}, {"rnak": 4}, "did you mean 'rank'"),
        ({}, {"rank": 1000}, "rank=1000"),
        ({}, {"rank": 0}, "rank=0"),
        ({}, {"betas": [0.9, 1.0]}, "betas"),
        ({}, {"target_modules": ["nothing_like_it"]}, "matches no matrix"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/"}}}, {}, "nvme"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, {}, "elastic_checkpoint"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {}, "torch_autocast"),
    ],
)
def test_refusals_are_one_clear_line(changes, params, words, door):
    for text in run_ranks(2, refused_case, changes=changes, params=params, door=door):
        assert words in text
        assert "\n" not in text


@pytest.mark.parametrize("stage", [2, 3])
def test_a_real_llama_matches_one_process(stage, steps):
    """Gradients now depend on the weights, so rounding feeds back; the contract holds all the same."""
    for error, name, loss in run_ranks(2, llama_case, stage=stage, steps=steps):
        assert error <= 1e-5, name
        assert loss < 4.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks with a GPU have no buffers in shared memory")
def test_the_buffers_of_ranks_have_no_name_and_so_go_with_them():
    for held in run_ranks(2, buffers_case):
        assert len(held) == 2 and all(name.endswith(" (deleted)") for name in held), held
