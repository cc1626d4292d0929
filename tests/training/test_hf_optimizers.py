"""``LoRAPreTrainer`` builds each optimizer from the training arguments."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, TrainingArguments

from lorapre_dist.config import ConfigError
from lorapre_dist.integrations.huggingface.trainer import LoRAPreTrainer, check_agreement
from lorapre_dist.optimizers import OPTIMIZERS
from tests.launch.conftest import REPO, TINY_LLAMA


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))


@pytest.fixture
def arguments(tmp_path):
    adam = {"learning_rate": 0.02, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **adam)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_come_from_the_training_arguments(name, model, arguments):
    trainer = LoRAPreTrainer(model, arguments, lorapre={"rank": 4}, optimizer_type=name)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is OPTIMIZERS[name]
    matrices, norms = (optimizer.group_config(group) for group in optimizer.param_groups)
    assert (matrices.lr, matrices.rank, matrices.weight_decay, norms.weight_decay) == (0.02, 4, 0.3, 0.0)
    adamw, of_norms = (optimizer.vector_hyper(optimizer.group_config(group), group) for group in optimizer.param_groups)
    assert (adamw.betas, adamw.eps, adamw.weight_decay) == ((0.8, 0.95), 1e-7, 0.3)
    assert of_norms.weight_decay == 0.0
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == model.num_parameters()


def test_a_name_that_is_none(model, arguments):
    with pytest.raises(ConfigError, match="optimizer_type='Muon': must be one of LoRAPre, LoRAPreMuon"):
        LoRAPreTrainer(model, arguments, optimizer_type="Muon")
    with pytest.raises(ConfigError, match="scale"):
        LoRAPreTrainer(model, arguments, lorapre={"scale": 0.1}, optimizer_type="LoRAPreMuon").create_optimizer()


def test_the_examples_own_learning_rate_learns(tmp_path, monkeypatch):
    """Trainer's 5e-5, times ``scale``, does not; every option of ``TrainingArguments`` is there as well."""
    monkeypatch.syspath_prepend(str(REPO / "launch"))
    example = importlib.import_module("hf_trainer")
    parser = HfArgumentParser((example.Arguments, example.Choice))
    arguments, _ = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true"])
    scale = json.loads((REPO / "ds_configs" / "hf_zero2.json").read_text())["optimizer"]["params"]["scale"]
    assert arguments.learning_rate * scale >= 1e-4
    assert arguments.logging_first_step and arguments.logging_steps <= 10
    given, _ = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--learning_rate", "0.5"])
    assert given.learning_rate == 0.5


def test_a_learning_rate_that_learns_nothing_is_warned_of(model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.warns(UserWarning, match=r"lr=5e-05 times scale=0\.25"):
        LoRAPreTrainer(model, arguments, lorapre={"rank": 4}).create_optimizer()


JSON = {"type": "LoRAPre", "params": {"rank": 16, "betas": [0.9, 0.99]}}


def test_arguments_that_say_what_the_deepspeed_json_says_are_taken():
    check_agreement(None, {"rank": 4}, "LoRAPreMuon")  # the JSON leaves the optimizer to the Trainer
    check_agreement(JSON, {}, None)
    check_agreement(JSON, {"rank": 16, "betas": (0.9, 0.99)}, "LoRAPre")
    check_agreement({"type": "AdamW", "params": {}}, {}, None)


@pytest.mark.parametrize(
    ("section", "options", "kind", "words"),
    [
        (JSON, {"rank": 8}, None, "lorapre rank=8: in the DeepSpeed JSON, optimizer.params.rank is 16"),
        (JSON, {"scale": 0.1}, None, "lorapre scale=0.1: in the DeepSpeed JSON, optimizer.params.scale is missing"),
        (JSON, {}, "LoRAPreMuon", "optimizer_type='LoRAPreMuon': the DeepSpeed JSON's optimizer.type is 'LoRAPre'"),
        ({"type": "AdamW"}, {"rank": 8}, None, "the DeepSpeed JSON's optimizer.type is 'AdamW', which has none of it"),
        ({"type": "AdamW"}, {}, "LoRAPre", "optimizer_type='LoRAPre': the DeepSpeed JSON's optimizer.type is 'AdamW'"),
    ],
)
def test_arguments_that_the_deepspeed_json_would_override_are_refused(section, options, kind, words):
    with pytest.raises(ConfigError, match=words):
        check_agreement(section, options, kind)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [("hf_trainer", "trainer", "LoRAPreTrainer"), ("hf_accelerate", "accelerate", "LoRAPreAccelerator")],
)
def test_the_old_places_give_the_same_and_warn(old, new, name):
    sys.modules.pop(f"lorapre_dist.training.{old}", None)
    with pytest.warns(FutureWarning, match=f"is now lorapre_dist.integrations.huggingface.{new}$"):
        before = importlib.import_module(f"lorapre_dist.training.{old}")
    now = importlib.import_module(f"lorapre_dist.integrations.huggingface.{new}")
    assert getattr(before, name) is getattr(now, name)
