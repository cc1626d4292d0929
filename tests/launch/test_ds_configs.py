"""Every shipped DeepSpeed JSON is accepted by DeepSpeed's own config class and by ours, at several world sizes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lorapre_dist.cli import main
from lorapre_dist.config import LoRAPreConfig
from lorapre_dist.config.ds_training import batch_sizes, precision, read_deepspeed_config, zero_stage
from lorapre_dist.integrations.deepspeed.bind import check_config
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.training.engines.models import preset_config
from lorapre_dist.training.finetune.settings import with_optimizer

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
LRS = {0.01, 0.005, 0.001, 0.0005, 0.0001}
NAMES = [f"tiny_zero{stage}" for stage in range(4)] + [f"llama_{n}_zero{s}" for n in RANKS for s in (1, 2, 3)]
OTHERS = {
    **{f"llama_{n}_zero2_muon": "LoRAPreMuon" for n in RANKS},
    **{f"tiny_zero2_{name.removeprefix('LoRAPre').lower()}": name for name in OPTIMIZERS if name != "LoRAPre"},
}
HYBRID = ["llama_70b_zero1"]  # over several axes
FINETUNE = ["finetune_zero2", "finetune_zero3", "finetune_tiny_zero2", "finetune_tiny_zero3"]
# For cards of 24 GB, with the ranks that they are for.
CARDS = {"llama_7b_24g": (1, 2, 8), "finetune_llama3_8b_24g": (1,), "finetune_llama3_8b_2x24g": (2,)}


class World:
    """What DeepSpeedConfig asks about the ranks."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_data_parallel_world_size(self) -> int:
        return self.size

    get_world_size = get_data_parallel_world_size


def test_nothing_else_is_shipped():
    # Those of the Hugging Face Trainer have tests of their own.
    assert {p.stem for p in FOLDER.glob("*.json") if not p.stem.startswith("hf_")} == {
        *NAMES,
        *OTHERS,
        *HYBRID,
        *FINETUNE,
        *CARDS,
    }


@pytest.mark.parametrize("name", [*NAMES, *OTHERS, *HYBRID, *FINETUNE])
def test_accepted_by_deepspeed_and_by_us(name, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig, dist

    # Without a process group it would take the world to be one rank.
    monkeypatch.setattr(dist, "get_rank", lambda: 0)

    config = read_deepspeed_config(str(FOLDER / f"{name}.json"))
    check_config(config)
    for size in (1, 2, 4) if "tiny" in name else (1, 2, 4, 8, 16):
        theirs = DeepSpeedConfig(json.loads(json.dumps(config)), mpu=World(size))
        ours = batch_sizes(config, size)
        assert theirs.train_batch_size == ours.global_batch
        assert theirs.train_micro_batch_size_per_gpu == ours.micro_batch
        assert theirs.gradient_accumulation_steps == ours.accumulation
        assert theirs.zero_optimization_stage == zero_stage(config) == int(name.split("zero")[1][0])
        assert theirs.bfloat16_config.enabled == (precision(config) == "bf16")
        assert theirs.gradient_clipping == 1.0


def test_70b_over_several_axes_fits(capsys):
    """On 256 ranks of 80 GB with half of that free, in sequences of 4096; what the launch lines in docs say."""
    argv = ["plan", "--model", "llama-70b", "--deepspeed_config", "llama_70b_zero1", "--world_size", "256", "--json"]
    assert main([*argv, "--seq_len", "4096"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["axes"] == {"data": 8, "pipeline": 4, "tensor": 8} and found["accumulation"] == 64
    assert found["low_rank_matrices"] == 7 * 80 and found["pipeline"]["bubble"] == 3 / 67
    assert round(found["optimizers"]["LoRAPre"]["largest_rank"]["total"] / 2**30, 1) == 19.2


@pytest.mark.parametrize("name", CARDS)
def test_those_for_a_card_are_accepted_and_fit(name, monkeypatch, capsys):
    """22 GiB of 24, on each rank, with the activations of the shortest sequences that their pages name."""
    from deepspeed.runtime.config import DeepSpeedConfig, dist

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    config = read_deepspeed_config(str(FOLDER / f"{name}.json"))
    ours = check_config(config)
    model, layout = ("llama-7b", ["--layout", "ddp"]) if "7b" in name else ("llama3-8b", [])
    for size in CARDS[name]:
        theirs = DeepSpeedConfig(json.loads(json.dumps(config)), mpu=World(size))
        assert theirs.train_batch_size == batch_sizes(config, size).global_batch
        assert ours.weights == "stochastic" and theirs.bfloat16_config.bf16_master_weights_and_grads
    argv = ["plan", "--model", model, *layout, "--deepspeed_config", str(FOLDER / f"{name}.json"), "--json"]
    argv += ["--world_size", str(CARDS[name][0]), "--gradient_checkpointing"]
    assert main([*argv, "--seq_len", "2048" if "7b" in name else "1024"]) == 0
    found = json.loads(capsys.readouterr().out)["optimizers"]["LoRAPre"]["largest_rank"]
    assert found["total"] <= 22 * 2**30 and found["activations"]


@pytest.mark.parametrize("name", OTHERS)
def test_only_the_optimizer_is_another(name):
    config = read_deepspeed_config(str(FOLDER / f"{name}.json"))
    same = read_deepspeed_config(str(FOLDER / f"{name.rpartition('_')[0]}.json"))
    optimizer, adam = config.pop("optimizer"), same.pop("optimizer")
    assert config == same
    assert optimizer["type"] == OTHERS[name]
    assert optimizer["params"]["rank"] == adam["params"]["rank"]
    assert optimizer["params"].get("adamw_lr", optimizer["params"]["lr"]) == adam["params"]["lr"]


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_settings_are_the_papers(name):
    config = read_deepspeed_config(str(FOLDER / f"{name}.json"))
    assert config["optimizer"]["type"] == "LoRAPre"
    params = LoRAPreConfig(**config["optimizer"]["params"])
    if name.startswith("tiny"):
        assert (params.rank, params.rank_v, params.scale, tuple(params.betas)) == (16, 2, 0.1, (0.9, 0.99))
        assert precision(config) == "fp32"
        return
    size = name.split("_")[1]
    assert params.rank == RANKS[size]
    assert params.rank < preset_config(f"llama-{size}").hidden_size
    assert (params.scale, params.lr in LRS) == (0.25, True)
    assert config["train_batch_size"] == 512
    assert precision(config) == "bf16"


@pytest.mark.parametrize("name", FINETUNE[:2])
def test_fine_tuning_settings_are_the_papers(name):
    config = read_deepspeed_config(str(FOLDER / f"{name}.json"))
    params = LoRAPreConfig(**config["optimizer"]["params"])
    assert (params.rank, params.lr, params.scale) == (8, 2e-5, 1.0)
    assert precision(config) == "bf16"
    adamw = with_optimizer(config, "adamw")["optimizer"]
    assert adamw == {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.999], "torch_adam": True}}


@pytest.mark.parametrize("given", [["--optimizer", "Muon"], ["--optimizer=AdamW"], ["--optimizer"]])
def test_the_quick_start_refuses_an_optimizer_that_it_does_not_know(given):
    script = FOLDER.parent / "launch" / "quickstart.sh"
    result = subprocess.run(["bash", str(script), *given], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and all(name in result.stderr for name in OPTIMIZERS)
