"""LoRA adapters with the Hugging Face Trainer under DeepSpeed: adapters are trained, all else is frozen."""

from __future__ import annotations

import os
import sys

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, TrainingArguments

from lorapre_dist.integrations.huggingface.trainer import LoRAPreTrainer
from tests.launch.conftest import TINY_LLAMA

LORAPRE = {"rank": 2, "rank_v": 1, "target_modules": ["lora_A", "lora_B"]}


def main() -> None:
    """Train, perhaps from a checkpoint."""
    argv = [*sys.argv[1:], "--use_cpu", "true", "--ddp_backend", "gloo"]
    (arguments,) = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses(argv)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY_LLAMA.items() if k != "model_type"}))
    model = get_peft_model(llama, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]))
    rows = torch.randint(400, (8, 32), generator=torch.Generator().manual_seed(1)).repeat(6, 1).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = LoRAPreTrainer(model=model, args=arguments, train_dataset=data, lorapre=LORAPRE)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # see lorapre_dist.training.run.program.script
