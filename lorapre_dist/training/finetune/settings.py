"""Command line of the fine-tuning program, checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError, extras
from lorapre_dist.config.arguments import Parser, naming_paths
from lorapre_dist.config.ds_training import (
    batch_sizes,
    check_release,
    override_lr,
    read_deepspeed_config,
    zero_stage,
)
from lorapre_dist.training.run.settings import (
    Help,
    RunSettings,
    add_output_options,
    add_run_options,
    check_model_folder,
    check_run,
    check_source,
    check_tokenizer,
    default_cache,
)

# MetaMath's (and Alpaca's) prompt, https://github.com/meta-math/MetaMath; the response follows at once.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response:"
)
OPTIMIZERS = ("lorapre", "adamw", "lora")
# What AdamW takes over from the JSON's LoRAPre.
SHARED_PARAMS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class FinetuneSettings(RunSettings):
    """What the command line of fine-tuning asks for. ``max_steps`` None until the data is known means ``epochs``."""

    optimizer: str | None
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    query_column: str | None
    response_column: str | None
    prompt_template: str
    max_examples: int | None
    epochs: float
    score: tuple[str, ...]
    score_split: str
    score_problems: int | None
    score_batch: int
    max_new_tokens: int

    def identity(self) -> dict[str, Any]:
        """Also which weights are trained."""
        lora = [self.lora_rank, self.lora_alpha, self.lora_dropout] if self.optimizer == "lora" else None
        return {**super().identity(), "lora": lora}


def build_parser() -> argparse.ArgumentParser:
    """The command line; every default is shown by ``--help``."""
    parser = Parser(
        prog="lorapre finetune",
        description="Fine-tune a causal LM on questions and answers under DeepSpeed, and score it by generation.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_data_options(parser.add_argument_group("data"))
    run = parser.add_argument_group("run")
    run.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="lorapre: the JSON's LoRAPre; adamw: AdamW with the JSON's lr, betas, eps and weight decay; lora: the "
        "same AdamW on LoRA adapters (peft), all else frozen (default: the JSON's optimizer, on all weights)",
    )
    run.add_argument("--lora_rank", type=int, default=8, help="rank of the adapters of --optimizer lora")
    run.add_argument("--lora_alpha", type=float, default=16.0, help="the adapters' scale is lora_alpha / lora_rank")
    run.add_argument("--lora_dropout", type=float, default=0.0, help="dropout before the adapters")
    run.add_argument("--epochs", type=float, default=1.0, help="passes over the examples")
    run.add_argument("--max_steps", type=int, help="optimizer steps, instead of --epochs; 0: only score")
    run.add_argument("--warmup_steps", type=int, help="steps of linear warm-up (default: 3%% of all)")
    add_run_options(run, save_every=200)
    _add_scoring_options(parser.add_argument_group("scoring"))
    add_output_options(parser.add_argument_group("output"), "runs/finetune")
    return parser


def _add_model_options(group: Any) -> None:
    group.add_argument("--model", required=True, help="a Hugging Face model: folder or hub name of any causal LM")
    group.add_argument("--tokenizer", help="folder or hub name (default: the model's)")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in backward")


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--dataset",
        default="metamath",
        help="examples: 'metamath' (meta-math/MetaMathQA), 'gsm8k' (openai/gsm8k), a hub name, or local files",
    )
    group.add_argument("--dataset_config", help="configuration of a hub dataset")
    group.add_argument("--dataset_split", default="train", help="split of a hub dataset")
    group.add_argument("--query_column", help="column with the question (default: query, question or problem)")
    group.add_argument("--response_column", help="column to learn (default: response, answer or solution)")
    group.add_argument("--prompt_template", default=ALPACA, help=r"text around {query}; \n is a line break")
    group.add_argument("--max_examples", type=int, help="train on a random choice of so many (default: all)")
    group.add_argument("--seq_len", type=int, default=1024, help="tokens per example at most; longer responses are cut")
    group.add_argument("--data_cache", default=default_cache(), help="folder for tokenised examples")


def _add_scoring_options(group: Any) -> None:
    group.add_argument(
        "--score",
        nargs="*",
        default=[],
        help="problems to solve before and after: 'gsm8k', 'math500', or files of their form (question, answer after "
        "####; or problem, answer in LaTeX)",
    )
    group.add_argument("--score_split", default="test", help="split of hub datasets to score")
    group.add_argument("--score_problems", type=int, help="only the first so many of each (default: all)")
    group.add_argument("--score_batch", type=int, default=16, help="prompts per rank that are generated together")
    group.add_argument("--max_new_tokens", type=int, default=512, help="length of a generated response at most")
    group.add_argument("--eval_every", type=int, default=0, help="steps between scorings; 0: first and last only")


@naming_paths()
def load_settings(argv: Sequence[str] | None, world_size: int) -> FinetuneSettings:
    """Parse and check ``argv``; ``world_size`` is needed to check the batch sizes.

    Raises:
        ConfigError: a bad value, a missing or malformed file, a package that is needed and not installed.
    """
    args = vars(build_parser().parse_args(argv))
    extras.need("train")
    if args["deepspeed_config"] is None:
        raise ConfigError("--deepspeed_config is needed: finetune_zero2, which is shipped, or a file like it")
    _check_model(args)
    _check_data(args)
    check_run(args, max_steps=0, max_examples=1, score_problems=1, score_batch=1, max_new_tokens=1, lora_rank=1)
    _check_numbers(args)
    ds_config = with_optimizer(read_deepspeed_config(args["deepspeed_config"]), args["optimizer"])
    if args["lr"] is not None:
        ds_config = override_lr(ds_config, args["lr"])
    _check_packages(args["optimizer"], zero_stage(ds_config))
    batch = batch_sizes(ds_config, world_size)
    check_release("deepspeed", ds_config, batch)
    return FinetuneSettings(**args, backend="deepspeed", ds_config=ds_config, batch=batch)


def with_optimizer(config: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The JSON with the optimizer that ``--optimizer`` names.

    Raises:
        ConfigError: ``lorapre``, and the JSON has another.
    """
    given = config["optimizer"]
    if name is None or (name == "lorapre" and given["type"] == "LoRAPre"):
        return config
    if name == "lorapre":
        raise ConfigError(
            f'--optimizer lorapre: the DeepSpeed JSON has {given["type"]}; give it "optimizer": {{"type": "LoRAPre", '
            '"params": {"lr": 2e-5, "rank": 8}}'
        )
    params = {key: value for key, value in (given.get("params") or {}).items() if key in SHARED_PARAMS}
    # DeepSpeed's own AdamW is compiled when it is first used, and has the same update.
    return config | {"optimizer": {"type": "AdamW", "params": {**params, "torch_adam": True}}}


def _check_model(args: dict[str, Any]) -> None:
    check_model_folder("--model", args["model"])
    check_tokenizer(args["tokenizer"])


def _check_data(args: dict[str, Any]) -> None:
    check_source("--dataset", args["dataset"])
    names = [score_name(name) for name in args["score"]]
    for name in args["score"]:
        check_source("--score", name)
        if names.count(score_name(name)) > 1:
            raise ConfigError(f"--score {name}: two data sets are called {score_name(name)!r}; rename a file")
    args["score"] = tuple(args["score"])
    args["prompt_template"] = args["prompt_template"].replace("\\n", "\n")
    if args["prompt_template"].count("{query}") != 1:
        raise ConfigError(f"--prompt_template {args['prompt_template']!r}: must hold {{query}} once")


def score_name(name: str) -> str:
    """What a data set is called in columns of metrics: a file's stem, or the last part of a hub name."""
    last = Path(name).name
    return (last.split(".")[0] or last).lower().replace("-", "")


def _check_numbers(args: dict[str, Any]) -> None:
    if args["seq_len"] < 8:
        raise ConfigError(f"--seq_len {args['seq_len']}: must be at least 8")
    if not 0.0 < args["epochs"] < 1e6:
        raise ConfigError(f"--epochs {args['epochs']}: must be a positive number")
    if not 0.0 < args["lora_alpha"] < float("inf"):
        raise ConfigError(f"--lora_alpha {args['lora_alpha']}: must be a positive number")
    if not 0.0 <= args["lora_dropout"] < 1.0:
        raise ConfigError(f"--lora_dropout {args['lora_dropout']}: must be at least 0 and below 1")
    if args["max_steps"] == 0 and not args["score"]:
        raise ConfigError("--max_steps 0 only scores: say with --score what")


def _check_packages(optimizer: str | None, stage: int) -> None:
    if optimizer == "lora":
        extras.need("finetune", "peft", why="--optimizer lora")
    if stage == 3:
        extras.need("finetune", "accelerate", why="ZeRO-3")
