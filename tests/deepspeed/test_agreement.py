"""Ranks whose JSON or model differ say so in one and the same line, under every stage."""

from __future__ import annotations

import warnings
from typing import Any

import deepspeed
import pytest
import torch

import lorapre_dist
from tests.covering import some
from tests.distributed.harness import run_ranks

from .cases import PARAMS, Net, ds_config, slopes


class Reversed(Net):
    """The same modules in another order."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = {name: self._modules[name] for name in sorted(self._modules)}


class Wider(Net):
    """One matrix of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.weight = self.head.weight = torch.nn.Parameter(torch.zeros(13, 12))


def frozen() -> Net:
    model = Net()
    model.get_submodule("layers.0.q_proj").weight.requires_grad_(False)
    return model


def _groups(model: Net) -> list[dict[str, Any]]:
    named = [p for p in model.parameters() if p.requires_grad]
    return [{"params": named[:2]}, {"params": named[2:]}]


#: What the last rank does otherwise (model, options, sections of the JSON, groups, type), and how the line names it.
OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"model": Reversed}, "parameter number 0"),
    "shape": ({"model": Wider}, "parameter 'embed.weight': (13, 11)"),
    "frozen": ({"model": frozen}, "trained on rank 0; (24, 36) float32, frozen on rank 1"),
    "lr": ({"params": {"lr": 0.02}}, "optimizer.params: "),
    "seed": ({"params": {"seed": 1}}, "optimizer.params: "),
    "class": ({"type": "LoRAPreAdafactor"}, "the optimizer: "),
    "clipping": ({"config": {"gradient_clipping": 1.0}}, "gradient_clipping: 0.0 on rank 0; 1.0 on rank 1"),
    "groups": ({"groups": _groups}, "the number of parameter groups: "),
    "callable": ({"callable": 0.02}, "lr of parameter group 0: "),
}


def disagreement_case(rank: int, world_size: int, *, stage: int) -> dict[str, str]:
    """What ``deepspeed.initialize`` says where the last rank does one thing otherwise."""
    said = {}
    for name, (change, _) in OTHERWISE.items():
        mine = change if rank == world_size - 1 else {}
        config = {**ds_config(stage, "fp32", 1, 0.0, {**PARAMS, **mine.get("params", {})}), **mine.get("config", {})}
        config["optimizer"]["type"] = mine.get("type", "LoRAPre")
        model = mine.get("model", Net)()
        kwargs = {"model_parameters": mine["groups"](model)} if "groups" in mine else {}
        if "callable" in change:
            del config["optimizer"]
            options = {**PARAMS, "lr": mine.get("callable", 0.01)}
            kwargs["optimizer"] = lambda params, options=options: lorapre_dist.LoRAPre(params, **options)
        try:
            deepspeed.initialize(model=model, config=config, **kwargs)[0].destroy()
            said[name] = "accepted"
        except lorapre_dist.ConfigError as error:
            said[name] = str(error)
    engine = deepspeed.initialize(model=Net(), config=ds_config(stage, "fp32", 1, 0.0, PARAMS))[0]
    engine.backward(engine(slopes(0, rank, 0, world_size)))
    engine.step()  # nothing is left behind
    engine.destroy()
    return said


def frozen_case(rank: int, world_size: int, *, stage: int, folder: str, freeze_first: bool) -> tuple[bool, int]:
    """Saved with a matrix trained (or frozen), resumed with it frozen (or trained): are the weights those saved?"""
    config = ds_config(stage, "fp32", 1, 0.0, PARAMS)
    saved = []
    for k, model in enumerate([frozen(), Net()] if freeze_first else [Net(), frozen()]):
        engine = deepspeed.initialize(model=model, config=config)[0]
        if k:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine.load_checkpoint(folder)
        weights = _weights(engine)
        if not k:
            engine.backward(engine(slopes(0, rank, 0, world_size)))
            engine.step()
            weights = _weights(engine)
            engine.save_checkpoint(folder, "now")
        saved.append(weights)
        if k:
            engine.backward(engine(slopes(1, rank, 0, world_size)))
            engine.step()
        engine.destroy()
    same = all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    return same, sum("are frozen now" in str(one.message) for one in caught)


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            found[name] = p.detach().clone()
    return found


@pytest.mark.parametrize("stage", some([0, 1, 2, 3], [1, 3]))
def test_ranks_that_disagree_all_raise_the_same_line(stage):
    first, *others = run_ranks(2, disagreement_case, stage=stage)
    assert all(said == first for said in others)
    for name, line in first.items():
        _, words = OTHERWISE[name]
        assert line.startswith("the ranks do not agree on ") and words in line, (name, line)
        assert "on rank 0; " in line and "on rank 1" in line and "\n" not in line, (name, line)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("freeze_first", [False, True])
def test_a_parameter_may_be_frozen_or_trained_from_a_checkpoint_on(stage, freeze_first, tmp_path):
    """DeepSpeed's optimizers do not hold what is frozen: its weights are loaded, its state is not, which is said."""
    arguments = {"stage": stage, "freeze_first": freeze_first, "folder": str(tmp_path)}
    for rank, (same, warned) in enumerate(run_ranks(2, frozen_case, **arguments)):
        assert same and warned == (not freeze_first and rank == 0)
