#!/usr/bin/env python
"""A plain training loop with Hugging Face Accelerate and LoRAPre, no downloads; the plugin is the YAML's.

    accelerate launch --config_file launch/accelerate_fsdp2.yaml launch/accelerate_train.py --output_dir runs/acc
    accelerate launch --config_file launch/accelerate_deepspeed.yaml launch/accelerate_train.py --output_dir runs/acc
    torchrun --nproc_per_node 2 launch/accelerate_train.py --output_dir runs/acc               # DDP

``--resume_from_checkpoint runs/acc/step20`` goes on from there.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from lorapre_dist.config import extras

extras.need_or_exit("hf", "train")

from accelerate.utils import DataLoaderConfiguration, set_seed
from hf_trainer import SEQ_LEN, VOCABULARY, data
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, get_cosine_schedule_with_warmup

from lorapre_dist import LoRAPre
from lorapre_dist.config import ConfigError
from lorapre_dist.config.arguments import Parser
from lorapre_dist.integrations.deepspeed import quiet
from lorapre_dist.integrations.huggingface.accelerate import LoRAPreAccelerator
from lorapre_dist.training.engines.models import preset_config
from lorapre_dist.training.run import ranks
from lorapre_dist.training.run.interruption import end_with_launcher
from lorapre_dist.training.run.metrics import METRICS_FILE, keep_until
from lorapre_dist.training.run.output_folder import claimed
from lorapre_dist.training.run.settings import default_cache


def options() -> argparse.Namespace:
    """The command line."""
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="of each rank")
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume_from_checkpoint", type=Path)
    given = parser.parse_args()
    resume = given.resume_from_checkpoint
    if resume is not None and not (resume.is_dir() and resume.name.removeprefix("step").isdecimal()):
        what = "is no checkpoint of this program's" if resume.exists() else "no such folder"
        raise ConfigError(f"--resume_from_checkpoint {resume}: {what}; name one as runs/acc/step20")
    return given


def main() -> None:
    """Train, save every ``--save_steps``, and log every step to ``metrics.jsonl``."""
    quiet.deepspeed()
    args = options()
    end_with_launcher()
    with claimed(args.output_dir):
        train(args)


def train(args: argparse.Namespace) -> None:
    """The training loop."""
    accelerator = LoRAPreAccelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    rows, tokenizer = data(default_cache())
    set_seed(args.seed)
    model = LlamaForCausalLM(preset_config("llama-tiny", SEQ_LEN, VOCABULARY))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(rows, batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    optimizer = LoRAPre(model, lr=args.learning_rate, rank=16, rank_v=2, scale=0.1)
    # A prepared schedule moves on once for each rank in every step.
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, args.max_steps * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(str(args.resume_from_checkpoint))
        step = int(args.resume_from_checkpoint.name.removeprefix("step"))
    if accelerator.is_main_process:
        keep_until(args.output_dir / METRICS_FILE, step)  # what a run that went further has logged comes again
    while step < args.max_steps:
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            mean = accelerator.reduce(loss.detach(), "mean").item()
            if accelerator.is_main_process:
                with open(args.output_dir / METRICS_FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "loss": mean, "lr": optimizer.param_groups[0]["lr"]}) + "\n")
            if step % args.save_steps == 0 or step == args.max_steps:
                accelerator.save_state(str(args.output_dir / f"step{step}"))
            if step == args.max_steps:
                break
    accelerator.print(f"training loss {mean:.4f} after {step} steps")
    accelerator.end_training()


if __name__ == "__main__":
    code = ranks.one_line(main)
    sys.stdout.flush()
    os._exit(code)  # see lorapre_dist.training.run.program.script
