"""What every training program is asked for, and the command line of pre-training; checked before any heavy import."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError, extras
from lorapre_dist.config.arguments import Parser, naming_paths
from lorapre_dist.config.ds_training import (
    BatchSizes,
    batch_sizes,
    check_native,
    check_release,
    model_axes,
    override,
    override_lr,
    read_deepspeed_config,
    zero_stage,
)
from lorapre_dist.training.data.local_files import (
    COMPRESSIONS,
    LOCAL_SUFFIXES,
    is_hub_form,
    is_local,
    is_saved,
    local_files,
)
from lorapre_dist.training.engines.presets import PRESETS, RECIPES, recipe

BUILTIN = "builtin"
BACKENDS = ("deepspeed", "fsdp2", "ddp")
# Each names the model, so that one of them is given at most.
MODEL_OPTIONS = ("model", "model_config", "init_from")
# Of files that hold a tokenizer.
TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "tekken.json")


@dataclass(frozen=True)
class RunSettings:
    """What every training program asks for; batch sizes, optimizer, clipping, precision are the DeepSpeed JSON's."""

    model: str | None
    backend: str
    deepspeed_config: str
    dataset: str
    dataset_config: str | None
    dataset_split: str
    tokenizer: str | None
    seq_len: int
    max_steps: int
    warmup_steps: int
    lr: float | None
    eval_every: int
    save_every: int
    keep_last: int | None
    background_save: bool
    log_every: int
    output_dir: str
    resume: str
    resize_rank: bool
    seed: int
    collective_timeout: float
    gradient_checkpointing: bool
    wandb: bool
    wandb_project: str
    run_name: str | None
    tensorboard: bool
    progress: bool
    data_cache: str
    local_rank: int
    ds_config: dict[str, Any]
    batch: BatchSizes

    @property
    def zero_stage(self) -> int | None:
        """ZeRO stage under DeepSpeed, None under the other backends."""
        return zero_stage(self.ds_config) if self.backend == "deepspeed" else None

    @property
    def model_name(self) -> str:
        """What to call the model."""
        return self.model or ""

    @property
    def first_weights(self) -> str:
        """What training starts from."""
        return "its own weights"

    def identity(self) -> dict[str, Any]:
        """What must be the same in a resumed run for it to continue the interrupted one, beside the data."""
        return {
            "optimizer": self.ds_config["optimizer"]["type"],
            "model": self.model_name,
            "seq_len": self.seq_len,
            "train_batch_size": self.batch.global_batch,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Settings(RunSettings):
    """What the command line of pre-training asks for."""

    recipe: str | None
    model_config: str | None
    init_from: str | None
    eval_dataset: str | None
    eval_split: str
    text_column: str | None
    streaming: bool
    shuffle_buffer: int
    read_attempts: int
    eval_fraction: float
    vocab_size: int | None
    eval_batches: int
    release_gradients: bool
    pipeline: int
    tensor: int
    expert: int

    @property
    def model_name(self) -> str:
        """The preset, or the folder, config file or hub name of a Hugging Face model."""
        return str(getattr(self, self.model_option.removeprefix("--")))

    @property
    def model_option(self) -> str:
        """The option that gave it."""
        return next(f"--{name}" for name in MODEL_OPTIONS if getattr(self, name))

    @property
    def preset(self) -> bool:
        """Whether the model is one of ours."""
        return self.model in PRESETS

    @property
    def first_weights(self) -> str:
        """What training starts from."""
        return super().first_weights if self.init_from else "random weights"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """States defaults, but not that there is none: the help text then says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The command line; every default is shown by ``--help``."""
    parser = Parser(
        prog="lorapre pretrain",
        description="Pre-train a causal LM with the optimizer of the DeepSpeed JSON.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="the paper's run of a model: its --model, --deepspeed_config, --dataset c4, --tokenizer t5-base, "
        "--output_dir and evaluation, where not given",
    )
    _add_model_options(parser.add_argument_group("model"))
    _add_data_options(parser.add_argument_group("data"))
    run = parser.add_argument_group("run")
    run.add_argument("--max_steps", type=int, help="optimizer steps in all (default: the preset's)")
    run.add_argument("--warmup_steps", type=int, help="steps of linear warm-up (default: a tenth of max_steps)")
    run.add_argument("--eval_every", type=int, default=500, help="steps between evaluations; 0: first and last only")
    run.add_argument("--eval_batches", type=int, default=16, help="global batches per evaluation; 0: all held-out text")
    run.add_argument(
        "--backend", default="deepspeed", choices=BACKENDS, help="what distributes; the last two are PyTorch's own"
    )
    run.add_argument(
        "--release_gradients",
        action="store_true",
        help="step each parameter in the backward pass, so that few gradients exist (fsdp2, ddp)",
    )
    run.add_argument(
        "--pipeline",
        type=int,
        help="stages of ranks that the layers are dealt out to (deepspeed; default: the JSON's pipeline.stages, or 1)",
    )
    run.add_argument(
        "--tensor",
        type=int,
        help="ranks that each matrix is split over (deepspeed; default: the JSON's tensor_parallel.autotp_size, or 1)",
    )
    run.add_argument(
        "--expert", type=int, default=1, help="ranks that the experts of each layer are dealt out to (fsdp2)"
    )
    add_run_options(run, save_every=1000)
    add_output_options(parser.add_argument_group("output"), "runs/pretrain")
    return parser


def _add_model_options(group: Any) -> None:
    group.add_argument(
        "--model",
        help=f"preset: {', '.join(PRESETS)}; or folder or hub name of a Hugging Face causal LM: its shapes, with "
        "random weights (default: llama-tiny)",
    )
    group.add_argument("--model_config", help="a Hugging Face config.json of any causal LM, instead of --model")
    group.add_argument(
        "--init_from",
        help="folder or hub name of a Hugging Face causal LM, instead of --model: training goes on from its weights, "
        "with its tokenizer",
    )
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in backward")


def add_corpus_options(parser: Any, eval_fraction: float) -> None:
    """What text there is, how it is divided and which tokenizer cuts it: also the options of ``lorapre tokenize``."""
    add = parser.add_argument
    add(
        "--dataset",
        default=BUILTIN,
        help="'builtin' (documentation of this Python installation), a file, folder or glob of .txt, .jsonl, .json, "
        ".csv or .parquet (also compressed) or of save_to_disk, the URL of one, 'c4', or a Hugging Face hub name",
    )
    add("--dataset_config", help="configuration of a hub dataset")
    add("--dataset_split", default="train", help="training split of a hub dataset")
    add("--eval_dataset", help="held-out text, in the forms of --dataset (default: see --eval_fraction)")
    add("--eval_split", default="validation", help="held-out split of a hub dataset, where it has one")
    add("--text_column", help="column that holds the text (default: 'text', or the only text column)")
    add("--read_attempts", type=int, default=5, help="times that a failing read of a stream is tried")
    add("--eval_fraction", type=float, default=eval_fraction, help="documents held out where no split exists")
    add("--tokenizer", help="folder or hub name (default: a byte-level BPE trained on the corpus)")
    add("--data_cache", default=default_cache(), help="folder for tokenizers and tokenised text")


def _add_data_options(group: Any) -> None:
    add_corpus_options(group, eval_fraction=0.05)
    group.add_argument("--streaming", action="store_true", help="read local files as a stream; hub names always are")
    group.add_argument(
        "--shuffle_buffer", type=int, default=10_000, help="sequences of a stream that wait to be shuffled; 0: none"
    )
    group.add_argument("--vocab_size", type=int, help="size of the BPE trained here (default: the model's)")
    group.add_argument("--seq_len", type=int, default=256, help="tokens per sequence")


def add_run_options(group: Any, save_every: int) -> None:
    """Options of every training program."""
    group.add_argument(
        "--deepspeed_config",
        help="DeepSpeed JSON: batch sizes, optimizer, precision; a file, or a name that lorapre configs lists; needed",
    )
    group.add_argument("--lr", type=float, help="overrides the JSON's optimizer.params.lr")
    group.add_argument("--save_every", type=int, default=save_every, help="steps between checkpoints; 0: none at all")
    group.add_argument("--keep_last", type=int, help="keep this many of the newest checkpoints (default: all)")
    group.add_argument("--background_save", action="store_true", help="write checkpoints while training goes on")
    group.add_argument(
        "--resume", default="auto", help="'auto' (the newest whole checkpoint if any), 'none', or a checkpoint tag"
    )
    group.add_argument("--resize_rank", action="store_true", help="resume although the JSON's rank or rank_v changed")
    group.add_argument("--seed", type=int, default=0, help="of what is drawn at the start, and of the data order")
    group.add_argument(
        "--collective_timeout",
        type=float,
        default=600.0,
        help="seconds that a rank waits for the others before it takes one for lost and the run ends",
    )
    group.add_argument("--local_rank", type=int, default=0, help="set by the launcher")


def add_output_options(group: Any, output_dir: str) -> None:
    """Where a training program writes to."""
    group.add_argument("--output_dir", default=output_dir, help="metrics, plot, TensorBoard files and checkpoints")
    group.add_argument("--log_every", type=int, default=1, help="steps between rows of metrics.jsonl")
    group.add_argument("--no_tensorboard", dest="tensorboard", action="store_false", help="write no TensorBoard files")
    group.add_argument("--no_progress", dest="progress", action="store_false", help="no progress bar")
    group.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    group.add_argument("--wandb_project", default="lorapre", help="project name for --wandb")
    group.add_argument("--run_name", help="name of the run for --wandb (default: name of output_dir)")


def default_cache() -> str:
    """``$LORAPRE_CACHE``, else a folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("LORAPRE_CACHE") or str(Path(base) / "lorapre_dist")


@naming_paths()
def load_settings(argv: Sequence[str] | None, world_size: int) -> Settings:
    """Parse and check ``argv``; ``world_size`` is needed to check the batch sizes.

    Raises:
        ConfigError: a bad value, a missing or malformed file.
    """
    parser = build_parser()
    args = vars(parser.parse_args(argv))
    extras.need("train")
    if args["recipe"] is not None:
        defaults = recipe(args["recipe"])
        if os.path.isfile(os.path.join(args["dataset"], "manifest.json")):
            defaults["tokenizer"] = None  # a tokenised folder brings its own
        parser.set_defaults(**defaults)
        args = vars(parser.parse_args(argv))
        if args["model"] == defaults["model"] and (args["model_config"] or args["init_from"]):
            args["model"] = None
    if args["deepspeed_config"] is None:
        raise ConfigError("--deepspeed_config is needed: a file, or a name that lorapre configs lists; or --recipe")
    _check_model(args)
    _own_tokenizer(args)
    check_corpus(args)
    check_run(args, eval_batches=0, shuffle_buffer=0, seq_len=2)
    ds_config = read_deepspeed_config(args["deepspeed_config"])
    if args["lr"] is not None:
        ds_config = override_lr(ds_config, args["lr"])
    if args["release_gradients"]:
        ds_config = override(ds_config, release_gradients=True)
    args |= {name: n for name, n in model_axes(ds_config).items() if args[name] is None}
    ds_config = _with_axes(args, ds_config, world_size)
    batch = batch_sizes(ds_config, world_size // (args["pipeline"] * args["tensor"]))
    if args["tensor"] > 1:  # DeepSpeed counts all ranks as data-parallel ones
        ds_config = {key: value for key, value in ds_config.items() if key != "train_batch_size"}
        ds_config["train_micro_batch_size_per_gpu"] = batch.micro_batch
        ds_config["gradient_accumulation_steps"] = batch.accumulation
    if args["backend"] != "deepspeed":
        check_native(args["backend"], ds_config)
    check_release(args["backend"], ds_config, batch)
    return Settings(**args, ds_config=ds_config, batch=batch)


def _with_axes(args: dict[str, Any], ds_config: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration for ``--pipeline`` and ``--tensor``, once they fit the rest."""
    _check_experts(args, world_size)
    stages, parts, zero = args["pipeline"], args["tensor"], zero_stage(ds_config)
    named = " ".join(f"--{name} {n}" for name, n in (("pipeline", stages), ("tensor", parts)) if n != 1)
    if (parts == 1 and model_axes(ds_config)["tensor"] > 1) or stages > 1:  # stages' layers are split without AutoTP
        ds_config = {key: value for key, value in ds_config.items() if key != "tensor_parallel"}
    if stages == parts == 1:
        return ds_config
    if min(stages, parts) < 1:
        raise ConfigError(f"{named}: must be at least 1")
    if args["backend"] != "deepspeed":
        raise ConfigError(f"{named} with --backend {args['backend']} is not supported: take --backend deepspeed")
    if world_size % (stages * parts):
        raise ConfigError(f"{named} on {world_size} ranks: {stages * parts} must divide the number of ranks")
    if zero > (1 if stages > 1 else 2):
        raise ConfigError(
            f"{named} with ZeRO stage {zero} is not supported: take stage {'0 or 1' if stages > 1 else '0, 1 or 2'}"
        )
    if stages > 1 and args["gradient_checkpointing"]:
        raise ConfigError(
            f"{named} with --gradient_checkpointing: set pipeline.activation_checkpoint_interval in the JSON"
        )
    if stages > 1:
        return {"steps_per_print": 10**9, **ds_config}
    return {**ds_config, "tensor_parallel": {**ds_config.get("tensor_parallel", {}), "autotp_size": parts}}


def _check_experts(args: dict[str, Any], world_size: int) -> None:
    """Check ``--expert`` against the rest, but the model."""
    named = f"--expert {args['expert']}"
    if args["expert"] == 1:
        return
    if args["expert"] < 1:
        raise ConfigError(f"{named}: must be at least 1")
    if args["backend"] != "fsdp2":
        raise ConfigError(f"{named} with --backend {args['backend']} is not supported: take --backend fsdp2")
    if args["init_from"]:
        raise ConfigError(f"{named} with --init_from is not supported: train from random weights, or take --expert 1")
    if world_size % args["expert"]:
        raise ConfigError(f"{named} on {world_size} ranks: must divide the number of ranks")


def describe(settings: RunSettings) -> dict[str, Any]:
    """The settings as plain values, for ``settings.json`` and trackers."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "batch"}


def _check_model(args: dict[str, Any]) -> None:
    given = [name for name in MODEL_OPTIONS if args[name]]
    if len(given) > 1:
        raise ConfigError(f"give --{given[0]} or --{given[1]}, not both")
    if not given:
        args["model"] = "llama-tiny"
    elif args["model_config"] and not Path(args["model_config"]).is_file():
        raise ConfigError(f"--model_config {args['model_config']}: no such file")
    elif args["init_from"]:
        check_model_folder("--init_from", args["init_from"])
    elif args["model"] and args["model"] not in PRESETS:
        near = difflib.get_close_matches(args["model"], PRESETS, n=1, cutoff=0.6)
        if near and "/" not in args["model"] and not Path(args["model"]).exists():
            raise ConfigError(
                f"unknown --model {args['model']}: did you mean {near[0]}? presets: {', '.join(PRESETS)}; or folder or "
                "hub name of a Hugging Face model"
            )
        if not Path(args["model"]).is_file():
            check_model_folder("--model", args["model"])
    if args["max_steps"] is None:
        if args["model"] not in PRESETS:
            raise ConfigError(f"--max_steps is needed with --{given[0]}")
        args["max_steps"] = PRESETS[args["model"]].steps
    if args["warmup_steps"] is None:
        args["warmup_steps"] = max(1, args["max_steps"] // 10)


def check_model_folder(option: str, name: str) -> None:
    """Raise a ConfigError if ``name`` means a local folder and no Hugging Face model is there."""
    folder = Path(name)
    if looks_like_path(name) and not folder.is_dir():
        raise ConfigError(f"{option} {name}: no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{option} {name}: holds no config.json; name a Hugging Face model folder")


def _own_tokenizer(args: dict[str, Any]) -> None:
    """Weights know the token ids of their own tokenizer; tokenised text was cut by one already."""
    folder = args["init_from"]
    if folder is None or args["tokenizer"] is not None or (Path(args["dataset"]) / "manifest.json").is_file():
        return
    if Path(folder).is_dir() and not any(file for pattern in TOKENIZER_FILES for file in Path(folder).glob(pattern)):
        raise ConfigError(f"--init_from {folder}: holds no tokenizer; say with --tokenizer which one its weights know")
    args["tokenizer"] = folder


def check_corpus(args: dict[str, Any]) -> None:
    """Raise :class:`ConfigError` if something in the options about the corpus is wrong on the face of it."""
    for name in ("dataset", "eval_dataset"):
        if args[name] is not None:
            check_source(f"--{name}", args[name])
    if not 0.0 < args["eval_fraction"] < 1.0:
        raise ConfigError(f"--eval_fraction {args['eval_fraction']}: must be between 0 and 1")
    if args["read_attempts"] < 1:
        raise ConfigError(f"--read_attempts {args['read_attempts']}: must be at least 1")
    # 256 bytes and the end-of-text token are the smallest byte-level vocabulary.
    if args["vocab_size"] is not None and args["vocab_size"] < 257:
        raise ConfigError(f"--vocab_size {args['vocab_size']}: must be at least 257")
    check_tokenizer(args["tokenizer"])


def check_tokenizer(tokenizer: str | None) -> None:
    """Raise a ConfigError if ``--tokenizer`` means a folder that is not there."""
    if tokenizer is not None and looks_like_path(tokenizer) and not Path(tokenizer).is_dir():
        raise ConfigError(f"--tokenizer {tokenizer}: no such folder")


def looks_like_path(name: str) -> bool:
    """Whether ``name`` can only mean a path: a hub name has at most one slash and no leading dot or slash."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.path.exists(name)


def check_source(option: str, name: str) -> None:
    """Raise :class:`ConfigError` if ``name`` means local files and there are none, or none that can be read."""
    path = Path(name)
    suffix = Path(name.removesuffix(next((c for c in COMPRESSIONS if name.endswith(c)), ""))).suffix
    if "://" in name or name == BUILTIN:
        return
    if not is_local(name):
        if looks_like_path(name) or suffix in LOCAL_SUFFIXES:
            raise ConfigError(f"{option} {name}: no such file or folder")
        return
    if path.is_file() and suffix not in LOCAL_SUFFIXES:
        raise ConfigError(f"{option} {name}: unknown kind of file; known: {', '.join(LOCAL_SUFFIXES)}")
    if path.is_dir() and (is_saved(path) or is_hub_form(path) or (path / "manifest.json").is_file()):
        return
    unreadable = next((file for file in local_files(name, option) if not os.access(file, os.R_OK)), None)
    if unreadable is not None:
        raise ConfigError(f"{option} {unreadable}: not readable")


def check_run(args: dict[str, Any], **least: int) -> None:
    """Check the options of every training program, and further integers against the least that each may be.

    Raises:
        ConfigError: the first bad one.
    """
    shared = {"max_steps": 1, "warmup_steps": 0, "eval_every": 0, "save_every": 0, "log_every": 1, "seed": 0}
    for name, smallest in (shared | least).items():
        if args[name] is not None and args[name] < smallest:
            raise ConfigError(f"--{name} {args[name]}: must be at least {smallest}")
    if args["keep_last"] is not None and args["keep_last"] < 1:
        raise ConfigError(f"--keep_last {args['keep_last']}: must be at least 1")
    if not 1.0 <= args["collective_timeout"] <= 86400.0:
        raise ConfigError(f"--collective_timeout {args['collective_timeout']:g}: must be from 1 to 86400 seconds")
    if args["max_steps"] is not None and (args["warmup_steps"] or 0) > args["max_steps"]:
        raise ConfigError(f"--warmup_steps {args['warmup_steps']}: more than --max_steps {args['max_steps']}")
    if args["lr"] is not None and not 0.0 < args["lr"] < float("inf"):
        raise ConfigError(f"--lr {args['lr']}: must be a positive number")
    if Path(args["output_dir"]).exists() and not Path(args["output_dir"]).is_dir():
        raise ConfigError(f"--output_dir {args['output_dir']}: is a file")
    if args["wandb"]:
        extras.need("wandb", why="--wandb")
