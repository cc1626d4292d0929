"""A DeepSpeed configuration: read as DeepSpeed reads it; what it would pass over or misread is refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from lorapre_dist import ConfigError
from lorapre_dist.config import ds_json
from lorapre_dist.integrations.deepspeed import keys
from lorapre_dist.integrations.deepspeed.bind import check_config, initialize

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "LoRAPre", "params": {"lr": 0.01, "rank": 4}},
    "zero_optimization": {"stage": 2},
}
TEXT = json.dumps(CONFIG, indent=1)
#: The forms that ``deepspeed.initialize`` takes beside JSON.
FORMS = {
    "comments": "// of a run\n" + TEXT.replace('"stage"', '# how much is cut\n"stage"') + "/* end */",
    "trailing commas": TEXT.replace("\n }", ",\n }").replace("\n}", ",\n}"),
    "byte order mark": "\ufeff" + TEXT,
    "no quotes": TEXT.replace('"stage"', "stage"),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_are_read_as_deepspeed_reads_them(form, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    path = tmp_path / "ds.json"
    path.write_text(FORMS[form], encoding="utf-8")
    assert ds_json.read(path) == CONFIG == DeepSpeedConfig(str(path))._param_dict
    assert check_config(path) == check_config(CONFIG)


def test_text_in_base64_is_read(tmp_path):
    encoded = base64.urlsafe_b64encode(TEXT.encode()).decode()
    assert ds_json.read(encoded) == CONFIG
    assert check_config(encoded) == check_config(CONFIG)


@pytest.mark.parametrize("name", ["gone.json", "gone", "x" * 300, "é", "a/b c"])
def test_a_file_that_is_not_there_is_named(name, tmp_path):
    for call in (check_config, lambda config: initialize(model=None, config=config)):
        with pytest.raises(ConfigError, match="no such file") as caught:
            call(name)
        assert name in str(caught.value)
    with pytest.raises(ConfigError, match="Is a directory"):
        check_config(tmp_path)


# As in https://www.deepspeed.ai/docs/config-json/ and DeepSpeed's tutorials, without what DeepSpeed 0.19 refuses.
DOCUMENTED: dict[str, dict[str, Any]] = {
    "batches": {"train_batch_size": 32, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 8},
    "scheduler": {
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 9}}
    },
    "communication": {
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
    },
    "fp16": {
        "fp16": {
            "enabled": True,
            "auto_cast": False,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "consecutive_hysteresis": False,
            "min_loss_scale": 1,
        }
    },
    "bf16": {"bf16": {"enabled": True}, "gradient_clipping": 1.0, "data_types": {"grad_accum_dtype": "fp32"}},
    "old bf16": {"bfloat16": {"enabled": True}},
    "zero 3 with offload": {
        "zero_optimization": {
            "stage": 3,
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "offload_param": {"device": "cpu", "pin_memory": True, "buffer_count": 5, "buffer_size": 1e8},
            "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 1.0, "buffer_count": 4},
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_prefetch_bucket_size": 5e8,
            "stage3_param_persistence_threshold": 1e6,
            "sub_group_size": 1e12,
            "stage3_gather_16bit_weights_on_model_save": True,
            "ignore_unused_parameters": True,
            "round_robin_gradients": False,
        }
    },
    "logging": {
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
    "aio": {"aio": {"block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False}},
    "autotuning": {"autotuning": {"enabled": False, "fast": True, "metric": "throughput", "start_profile_step": 3}},
    "flops profiler": {
        "flops_profiler": {
            "enabled": False,
            "profile_step": 1,
            "module_depth": -1,
            "top_modules": 1,
            "detailed": True,
            "output_file": None,
        }
    },
    "activation checkpointing": {
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "number_checkpoints": None,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        }
    },
    "data efficiency": {
        "data_efficiency": {
            "enabled": True,
            "seed": 1234,
            "data_routing": {"enabled": False, "random_ltd": {"enabled": False, "total_layer_num": 24}},
            "data_sampling": {
                "enabled": False,
                "num_epochs": 1000,
                "num_workers": 0,
                "curriculum_learning": {"enabled": False, "data_cluster_path": "x", "curriculum_metrics": {}},
            },
        }
    },
    "monitors": {
        "tensorboard": {"enabled": True, "output_path": "logs/", "job_name": "train_llama"},
        "wandb": {"enabled": False, "group": "my_group", "team": "my_team", "project": "my_project"},
        "comet": {"enabled": False, "workspace": "my_workspace", "project": "my_project", "samples_log_interval": 50},
        "csv_monitor": {"enabled": True, "output_path": "csv/", "job_name": "train_bert"},
    },
    "communication logging": {
        "comms_logger": {
            "enabled": True,
            "verbose": False,
            "prof_all": True,
            "debug": False,
            "prof_ops": ["all_reduce"],
        }
    },
    "checkpoint": {
        "checkpoint": {
            "tag_validation": "Warn",
            "load_universal": False,
            "use_node_local_storage": False,
            "parallel_write": {"pipeline_stage": False},
        }
    },
    "timers": {"timers": {"throughput": {"enabled": True, "synchronized": True}}},
    "pipeline": {"pipeline": {"stages": "auto", "partition": "best"}},
    "autocast": {"torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": ["x.Y"]}},
    "sequence parallel": {"sequence_parallel_size": 1, "data_parallel_size": 1},
    "comments": {"_comment": "why", "//": "why", "#lr": 3},
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_deepspeed_documents_is_taken(name):
    config = CONFIG | DOCUMENTED[name]
    ds_json.check_values(config)
    keys.check(config)
    assert check_config(config) == check_config(CONFIG)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "typo at the top": ({"gradient_cliping": 1.0}, r"'gradient_cliping': did you mean 'gradient_clipping'\?"),
    "British": ({"zero_optimisation": {"stage": 3}}, r"did you mean 'zero_optimization'\?"),
    "own key": ({"my_framework": {}}, "unknown key 'my_framework': DeepSpeed does not read it"),
    "option beside params": (
        {"optimizer": {"type": "LoRAPre", "lr": 0.01}},
        "'optimizer.lr': the optimizer's options belong into optimizer.params",
    ),
    "typo in a model of DeepSpeed": (
        {"zero_optimization": {"stage": 2, "overlap_com": True}},
        r"'zero_optimization.overlap_com': did you mean 'zero_optimization.overlap_comm'\?",
    ),
    "typo in a section within": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"devic": "cpu"}}},
        r"did you mean 'zero_optimization.offload_optimizer.device'\?",
    ),
    "typo in an old section": (
        {"activation_checkpointing": {"cpu_checkpointin": True}},
        r"did you mean 'activation_checkpointing.cpu_checkpointing'\?",
    ),
    "both names of bf16": ({"bf16": {"enabled": False}, "bfloat16": {"enabled": True}}, "unknown key 'bfloat16'"),
    "auto precision": ({"bf16": {"enabled": "auto"}}, "bf16.enabled is 'auto'"),
    "auto stage": ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'"),
    "auto option": ({"optimizer": {"type": "LoRAPre", "params": {"lr": "auto"}}}, "optimizer.params.lr is 'auto'"),
    "precision as a string": ({"bf16": {"enabled": "true"}}, "bf16.enabled='true': must be true or false"),
    "stage as a string": ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage='3': must be 0, 1, 2 or 3"),
    "switch as a string": ({"prescale_gradients": "false"}, "prescale_gradients='false': must be true or false"),
    "number as a string": ({"gradient_predivide_factor": "1"}, "gradient_predivide_factor='1': must be a number"),
    "clipping as a string": ({"gradient_clipping": "1.0"}, "gradient_clipping='1.0': must be a number"),
    "batch as a string": ({"train_batch_size": "8"}, "train_batch_size='8': must be a positive integer"),
    "bucket as a string": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
        "zero_optimization.reduce_bucket_size='big': Input should be a valid integer",
    ),
    "section that is none": ({"fp16": True}, "fp16=True: must be a JSON object"),
    "optimizer that is none": ({"optimizer": "LoRAPre"}, "optimizer='LoRAPre': must be a JSON object"),
    "type that is none": ({"optimizer": {"type": ["LoRAPre"]}}, r"optimizer.type=\['LoRAPre'\]: must be the name"),
    "params that are none": ({"optimizer": {"type": "LoRAPre", "params": [1]}}, r"optimizer.params=\[1\]: must be a"),
    "number beyond any": ({"steps_per_print": 10**400}, "steps_per_print: a number of 401 digits"),
    "option of another AdamW": (
        {"optimizer": {"type": "LoRAPre", "params": {"fused": True}}},
        "LoRAPre has no option 'fused': there is one implementation; leave it out",
    ),
    "clipping in params": (
        {"optimizer": {"type": "LoRAPreMuon", "params": {"max_grad_norm": 1.0}}},
        "LoRAPreMuon has no option 'max_grad_norm': use the DeepSpeed JSON's gradient_clipping",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_misread_is_refused_by_name(name, tmp_path):
    changes, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as caught:
        check_config(CONFIG | changes)
    assert "\n" not in str(caught.value)
    path = Path(tmp_path / "ds.json")
    path.write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ConfigError, match=f"{path}.*: .*{words}"):
        check_config(path)


def test_the_old_switch_of_zero_is_stage_1():
    """As DeepSpeed takes it."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = CONFIG | {"zero_optimization": True}
    assert ds_json.zero_stage(config) == 1 == DeepSpeedConfig(config).zero_optimization_stage
    check_config(config)


def test_a_configuration_of_another_optimizer_is_checked_at_our_door_as_well():
    adamw = {"type": "AdamW", "params": {"lr": 0.01, "fused": True}}
    assert check_config(CONFIG | {"optimizer": adamw}) is None
    with pytest.raises(ConfigError, match="gradient_cliping"):
        check_config(CONFIG | {"optimizer": adamw, "gradient_cliping": 1.0})


SIXTEEN = {"enabled": True, "bf16_master_weights_and_grads": True}


def sixteen(weights, bf16=SIXTEEN, stage=2, **more):
    params = {**CONFIG["optimizer"]["params"], "weights": weights}
    optimizer = {**CONFIG["optimizer"], "params": params}
    return CONFIG | {"optimizer": optimizer, "bf16": bf16, "zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_weights_without_masters_are_taken(weights, stage):
    offload = {"offload_optimizer": {"device": "cpu"}}
    for bf16 in (SIXTEEN, SIXTEEN | {"bf16_optimizer_states": True}):
        for more in ({}, offload):
            assert check_config(sixteen(weights, bf16, stage, **more)).weights == weights


@pytest.mark.parametrize(
    "config, words",
    [
        (sixteen("kahan", {"enabled": False}), "weights='kahan': is for bf16 weights; set bf16.enabled"),
        (
            sixteen("kahan", {"enabled": True}),
            "would keep fp32 masters; set bf16.bf16_master_weights_and_grads to true",
        ),
        (sixteen("stochastic", {"enabled": True}, stage=0), "ZeRO stage 0 keeps fp32 masters; take stage 1, 2 or 3"),
        (sixteen("stochastic", stage=0), "only supported with ZeRO Stage 1, 2, or 3"),
        (
            sixteen("stochastic", stage=1) | {"data_types": {"grad_accum_dtype": "fp32"}},
            "ZeRO stage 1 keeps fp32 masters",
        ),
        (sixteen(None), "would lose small updates in rounding; set weights='stochastic' or 'kahan'"),
        (sixteen("master"), "would lose small updates in rounding; set weights='stochastic' or 'kahan'"),
        (CONFIG | {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "take bf16"),
    ],
)
def test_what_would_not_step_bf16_weights_is_refused(config, words):
    with pytest.raises(ConfigError) as raised:
        check_config(config)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
