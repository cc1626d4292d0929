#!/usr/bin/env python
"""A small Llama with the Hugging Face Trainer and LoRAPre, no downloads.

    deepspeed --num_gpus 2 launch/hf_trainer.py --deepspeed ds_configs/hf_zero2.json --output_dir runs/hf
    torchrun --nproc_per_node 2 launch/hf_trainer.py --fsdp --output_dir runs/hf      # FSDP2
    torchrun --nproc_per_node 2 launch/hf_trainer.py --output_dir runs/hf      # DDP, the state dealt out over the ranks

Every option of ``TrainingArguments`` works; ``--resume_from_checkpoint runs/hf/checkpoint-20`` goes on from there.
``--optimizer_type LoRAPreMuon`` takes another optimizer, where no DeepSpeed JSON names one.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from lorapre_dist.config import extras

extras.need_or_exit("hf", "train")

import datasets
import torch
from transformers import DataCollatorForLanguageModeling, HfArgumentParser, LlamaForCausalLM, TrainingArguments

from lorapre_dist.checkpoint.files import weights_only
from lorapre_dist.config import ConfigError, shipped
from lorapre_dist.config.arguments import Parser
from lorapre_dist.integrations.deepspeed import quiet
from lorapre_dist.integrations.huggingface.trainer import LoRAPreTrainer
from lorapre_dist.training.data import builtin_text
from lorapre_dist.training.data.tokenizer import trained_tokenizer
from lorapre_dist.training.engines.models import preset_config
from lorapre_dist.training.run import ranks
from lorapre_dist.training.run.interruption import end_with_launcher
from lorapre_dist.training.run.output_folder import claimed
from lorapre_dist.training.run.settings import default_cache

SEQ_LEN, VOCABULARY, DOCUMENTS = 128, 2048, 400


@dataclass
class Arguments(TrainingArguments):
    """Trainer's own, but with a learning rate for LoRAPre, and the loss shown from the first step on."""

    learning_rate: float = field(default=5e-3, metadata={"help": "times scale; Trainer's 5e-5 would learn nothing"})
    logging_steps: float = field(default=10, metadata={"help": "Steps between losses that are shown."})
    logging_first_step: bool = field(default=True, metadata={"help": "Show the first step's loss."})

    def __post_init__(self) -> None:
        """The name of a shipped configuration stands for its file."""
        if isinstance(self.deepspeed, str):
            self.deepspeed = str(shipped.located(self.deepspeed))
        super().__post_init__()


@dataclass
class Choice:
    """Options beside Trainer's own."""

    optimizer_type: str | None = None


class OptionParser(Parser, HfArgumentParser):
    """Whose errors are one line."""


def options(arguments: list[str]) -> tuple[Arguments, Choice]:
    """The command line.

    Raises:
        ConfigError: an unknown or bad option, or no checkpoint where one is to be resumed from.
    """
    parser = OptionParser((Arguments, Choice))
    try:
        training, choice, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    resume = training.resume_from_checkpoint
    if resume is not None and not (Path(resume) / "trainer_state.json").is_file():
        what = "is no checkpoint of Trainer's" if Path(resume).exists() else "no such folder"
        raise ConfigError(f"--resume_from_checkpoint {resume}: {what}; name one as runs/hf/checkpoint-20")
    return training, choice


def data(cache: str) -> tuple[datasets.Dataset, object]:
    """Sequences of the built-in text, and their tokenizer."""
    from itertools import islice

    texts = list(islice(builtin_text.documents(), DOCUMENTS))
    tokenizer = trained_tokenizer(lambda: iter(texts), f"hf-{builtin_text.fingerprint()}", VOCABULARY, Path(cache))
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    rows = [ids[k : k + SEQ_LEN] for k in range(0, len(ids) - SEQ_LEN, SEQ_LEN)]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return datasets.Dataset.from_dict({"input_ids": rows}), tokenizer


def main() -> None:
    """Train, and save at the end."""
    end_with_launcher()
    cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    cpu += ["--ddp_backend", "gloo"] if cpu and "LOCAL_RANK" in os.environ else []
    quiet.deepspeed()
    arguments, choice = options([*sys.argv[1:], *cpu])
    with claimed(Path(arguments.output_dir)):
        train(arguments, choice)


def train(arguments: Arguments, choice: Choice) -> None:
    """Train, from a checkpoint where one is named."""
    rows, tokenizer = data(default_cache())
    torch.manual_seed(arguments.seed)
    trainer = LoRAPreTrainer(
        model=LlamaForCausalLM(preset_config("llama-tiny", SEQ_LEN, VOCABULARY)),
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        lorapre={"rank": 16, **({"rank_v": 2, "scale": 0.1} if choice.optimizer_type in (None, "LoRAPre") else {})},
        optimizer_type=choice.optimizer_type,
    )
    resume = arguments.resume_from_checkpoint
    with weights_only(Path(resume)) if resume else nullcontext():  # whichever optimizer a DeepSpeed JSON names
        result = trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        print(f"training loss {result.training_loss:.4f} after {trainer.state.global_step} steps", flush=True)


if __name__ == "__main__":
    code = ranks.one_line(main)
    sys.stdout.flush()
    os._exit(code)  # see lorapre_dist.training.run.program.script
