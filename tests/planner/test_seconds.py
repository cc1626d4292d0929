"""What a step computes, and seconds predicted from it; which optimizers are planned for."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorapre_dist.cli import main
from lorapre_dist.config import CONFIGS, LoRAPreConfig
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.planner import Parameter, Request, names, plan
from lorapre_dist.planner.models import load
from lorapre_dist.planner.seconds import DEVICES, Rates, rate, seconds

ARGUMENTS = ["plan", "--model", "llama-60m", "--stage", "2", "--world_size", "6", "--rank", "128"]


def test_seconds_follow_from_rates_and_counts():
    usage = plan(Request("60m", load("llama-60m"), "fsdp2", 8, optimizer=LoRAPreConfig(rank=64)))["LoRAPre"]
    slow = Rates(flops=1e9, bandwidth=1e15, network=1e9, launch=1e-12, solve=1e9, latency=1e-6)
    found = seconds(usage, slow)
    assert found.bound == "products" and found.compute == usage.work.products / 1e9
    assert found.solves == usage.work.solves / 1e9
    sent = sum(float(n[0]) for n in usage.sent.values())
    assert math.isclose(found.network, sent / 1e9 + usage.calls * 1e-6)
    assert found.step == found.compute + found.solves + found.network
    assert seconds(usage, replace(slow, flops=1e15, bandwidth=1e9)).bound == "memory"
    assert seconds(usage, replace(slow, flops=1e18, launch=1.0)).bound == "launches"


def test_ranks_share_the_work():
    """Products and solves of N ranks are those of one, but for what a cut row costs."""
    model = load("llama-60m")
    for kind, config in CONFIGS.items():
        whole = plan(Request("60m", model, "zero0", 1, optimizer=config(rank=64)))[kind].work
        part = plan(Request("60m", model, "fsdp2", 8, optimizer=config(rank=64)))[kind].work
        assert whole.products / 8 <= 1.01 * part.products <= 1.4 * whole.products / 8
        assert whole.solves == 8 * part.solves


@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_started_are_about_what_is_counted(kind):
    """On the device without numbers, where a step goes the way of an accelerator."""
    shapes = [("layers.0.q_proj.weight", (512, 512)), ("layers.0.up_proj.weight", (4096, 4096))]
    weights = [(name, torch.nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in shapes]
    optimizer = OPTIMIZERS[kind](weights, lr=1e-3, rank=32)
    for _, p in weights:
        p.grad = torch.empty_like(p)
    optimizer.step()
    with Operations() as counted:
        optimizer.step()
    model = tuple(Parameter(name, shape) for name, shape in shapes)
    said = plan(Request("two", model, "zero0", optimizer=CONFIGS[kind](rank=32)))[kind].work
    assert 0.7 * counted.calls <= said.calls <= 1.3 * counted.calls
    assert 0.7 * counted.moved <= said.moved <= 1.3 * counted.moved


VIEWS = {"view", "slice", "select", "t", "transpose", "expand", "as_strided", "detach", "unsqueeze", "split", "unbind"}
VIEWS |= {"permute", "alias", "_unsafe_view", "diagonal", "split_with_sizes", "squeeze"}


class Operations(TorchDispatchMode):
    """Counts operations that are no views, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            read = [v for k, v in (kwargs or {}).items() if k != "out"]
            self.calls += 1
            self.moved += sum(t.nbytes for t in tree_leaves((args, read, made)) if isinstance(t, torch.Tensor))
        return made


def test_every_one_of_our_optimizers_is_planned_for(capsys):
    assert main([*ARGUMENTS, "--optimizer", "all", "--device", "h100", "--network", "50G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["optimizers"]) == [*CONFIGS, "AdamW", "Muon", "GaLore"]
    assert found["rates"] == {**vars(DEVICES["h100"]), "network": 5e10}
    assert any("predicted, not measured" in note for note in found["notes"])
    for kind, config in CONFIGS.items():
        request = Request("60m", load("llama-60m"), "zero2", 6, optimizer=config(rank=128))
        own = found["optimizers"][kind]
        time = own.pop("seconds_per_step")
        assert own == plan(request, (kind,))[kind].summary()
        assert time["step"] == time["compute"] + time["solves"] + time["network"] > 0
    assert main([*ARGUMENTS, "--optimizer", "LoRAPreMuon", "--device", "a100", "--max_memory", "2GiB"]) == 0
    text = capsys.readouterr().out
    assert (
        "LoRAPreMuon fits in 2.00 GiB as it is: " in text and "predicted ms of a step" in text and "flops 8e+13" in text
    )


def test_a_json_may_ask_for_any_of_ours(capsys, tmp_path):
    path = tmp_path / "ds.json"
    optimizer = {"type": "LoRAPreMuon", "params": {"lr": 0.01, "rank": 32, "ns_steps": 3}}
    config = {"train_batch_size": 4, "optimizer": optimizer, "zero_optimization": {"stage": 3}}
    path.write_text(json.dumps(config))
    arguments = ["plan", "--model", "llama-60m", "--world_size", "4", "--json", "--deepspeed_config", str(path)]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["optimizers"]
    ours = CONFIGS["LoRAPreMuon"](lr=0.01, rank=32, ns_steps=3)
    request = Request("60m", load("llama-60m"), "zero3", 4, "fp32", optimizer=ours)
    assert list(found) == list(names(request))
    assert found["LoRAPreMuon"] == plan(request)["LoRAPreMuon"].summary()


@pytest.mark.parametrize("text, value", [("300e12", 3e14), ("300T", 3e14), ("50 G", 5e10), ("5e-6", 5e-6), ("2", 2.0)])
def test_rates(text, value):
    assert rate(text) == value
