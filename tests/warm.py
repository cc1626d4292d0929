"""Imported by the process that all ranks of tests are forked from (see ``tests/forks.py``), once a session.

Each of these takes from half a second to several of every process that needs it: the libraries, and what they, torch
above all, import only on the first step of an optimizer, the first shard or the first checkpoint.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre_dist.training.run.plots import plot_loss

MODULES = [
    "pytest",
    "torch._dynamo",  # at the first optimizer
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.profiler._cupti_monitor",
    "torch.utils.cpp_extension",  # at the loading of DeepSpeed's op
    "torch.utils.serialization",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.original_muon",
    "datasets.packaged_modules.generator.generator",
    "lorapre_dist.training.engines.engines",
    "lorapre_dist.training.engines.native",
    "lorapre_dist.training.run.app",
    "lorapre_dist.training.run.loop",
    "lorapre_dist.training.finetune.app",
    "lorapre_dist.training.finetune.loop",
    "lorapre_dist.integrations.deepspeed.bind",
    "lorapre_dist.integrations.huggingface.trainer",
]

for name in MODULES:
    importlib.import_module(name)
# transformers compiles the names of all its models' weights when the first model is saved
with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    plot_loss([{"step": 1, "loss": 1.0, "eval_loss": 1.0}], Path(folder) / "loss.png", "fonts are read at the first")
gc.collect()
gc.freeze()  # so that the collector does not write to, and so copy, what the ranks share
