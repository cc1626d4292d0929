"""The command ``lorapre``: the training programs, and what is done before and after a run, without devices.

A command is an entry of ``COMMANDS``: its options, and a function that runs it and returns the exit code. A program, an
entry of ``PROGRAMS``, reads its own command line. What is slow to import is imported in these functions.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapre_dist import __version__
from lorapre_dist.checkpoint import CheckpointError
from lorapre_dist.config import ConfigError, ds_json, extras, shipped
from lorapre_dist.config.arguments import Parser, readable
from lorapre_dist.integrations.deepspeed import quiet


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        what: in half a line.
        example: of its arguments.
        options: adds them to a parser.
        run: does it; the exit code.
    """

    what: str
    example: str
    options: Callable[[argparse.ArgumentParser], Any]
    run: Callable[[argparse.Namespace], int]


# consolidate --------------------------------------------------------------------------------------------------------


def _consolidate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or a run's: then its latest one")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("keep", "fp32", "bf16", "fp16"),
        default="keep",
        help="of the weights (default: keep, what was saved; the optimizer state always stays as it was saved)",
    )
    parser.add_argument("--no-optimizer", action="store_true", help="weights alone")
    parser.add_argument(
        "--config",
        type=Path,
        help="config.json, or a model folder with it and the tokenizer (default: the checkpoint's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result in OUT")


def _consolidate(options: argparse.Namespace) -> int:
    from lorapre_dist.checkpoint.consolidate import consolidate

    source = _announced(options.checkpoint)
    result = consolidate(
        source,
        options.out,
        dtype=options.dtype,
        optimizer=not options.no_optimizer,
        config=options.config,
        overwrite=options.overwrite,
    )
    weights, states = result.bytes
    print(f"{result.out}: {result.weights} weights, {readable(weights)}", end="")
    print(f"; {result.optimizer_tensors} tensors of optimizer state, {readable(states)}" * (not options.no_optimizer))
    for note in result.notes:
        print(f"note: {note}")
    return 0


def _announced(path: Path) -> Path:
    """The checkpoint that ``path`` stands for; says which, where it is a run's folder."""
    from lorapre_dist.checkpoint.stored import locate

    found = locate(path)
    if found != path:
        print(f"latest checkpoint: {found}", flush=True)
    return found


# inspect ------------------------------------------------------------------------------------------------------------


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, help="a checkpoint's folder, one that holds several, a run's, or a tokenised corpus"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor (of one checkpoint)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _inspect(options: argparse.Namespace) -> int:
    from lorapre_dist.checkpoint import inspect, stored
    from lorapre_dist.checkpoint.folder import latest_problem
    from lorapre_dist.training.data import tokenized

    if tokenized.is_tokenized(options.path):
        facts = tokenized.TokenFolder.open(options.path, check=False).describe()
        print(json.dumps(facts, indent=1) if options.json else tokenized.render(facts))
        return 0 if facts["whole"] else 1
    directory = stored.tags_in(options.path)
    if directory is not None:
        tags = inspect.overview(directory)
        if options.tensors:
            raise ConfigError(f"--tensors: name one checkpoint of {directory}: {', '.join(tag['tag'] for tag in tags)}")
        problem = latest_problem(directory)
        if options.json:
            print(json.dumps(tags, indent=1))
            print(f"warning: {problem}\n" * (problem is not None), end="", file=sys.stderr)
        else:
            print(inspect.render_overview(tags, problem))
        return 1 if problem or not all(tag["whole"] for tag in tags) else 0
    found = inspect.describe(options.path)
    if options.json and not options.tensors:
        found.pop("parameters", None)
    print(json.dumps(found, indent=1) if options.json else inspect.render(found, options.tensors))
    return 0 if found["whole"] else 1


# tokenize -----------------------------------------------------------------------------------------------------------


def _tokenize_options(parser: argparse.ArgumentParser) -> None:
    from lorapre_dist.training.run.settings import add_corpus_options

    parser.add_argument("out", help="folder to write; a run that was killed goes on where it was")
    add_corpus_options(parser, eval_fraction=0.01)
    parser.add_argument("--vocab_size", type=int, help="size of a BPE trained here (default: 32000)")
    parser.add_argument("--max_tokens", type=int, help="about so many tokens to train on (default: the whole corpus)")
    parser.add_argument("--eval_tokens", type=int, default=10_000_000, help="of a held-out split or --eval_dataset")
    parser.add_argument("--part_tokens", type=int, default=2**27, help="tokens of one file, the step of a resume")
    parser.add_argument("--workers", type=int, default=1, help="processes, each at one shard of the corpus")
    parser.add_argument("--no_progress", dest="progress", action="store_false", help="no progress bar")


def _tokenize(options: argparse.Namespace) -> int:
    from lorapre_dist.training.run.settings import check_corpus

    given = vars(options)
    extras.need("train")
    check_corpus(given)
    for name in ("max_tokens", "eval_tokens", "part_tokens", "workers"):
        if given[name] is not None and given[name] < 1:
            raise ConfigError(f"--{name} {given[name]}: must be at least 1")
    progress = given.pop("progress")
    from lorapre_dist.training.data.tokenize import Job, tokenize

    found = tokenize(Job(**given), progress).content
    train, held_out = found["train"], found["held_out"]
    print(f"{options.out}: {train['tokens']:,} tokens of {train['documents']:,} documents to train on, ", end="")
    print(f"{held_out['tokens']:,} held out; {found['vocab_size']} token ids as {found['dtype']}")
    return 0


# configs ------------------------------------------------------------------------------------------------------------


def _configs_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy the files to DIR, with those of lorapre launch")
    parser.add_argument("--overwrite", action="store_true", help="replace changed files in DIR")


def _configs(options: argparse.Namespace) -> int:
    if options.copy is not None:
        copies = shipped.copy(options.copy, options.overwrite)
        others = ", ".join(shipped.LAUNCH_FILES)
        print(f"{options.copy}: {len(copies) - len(shipped.LAUNCH_FILES)} DeepSpeed configurations, {others}")
        return 0
    print(f"{'--deepspeed_config':<24} {'optimizer':<16} {'rank':>4} {'lr':>7} {'ZeRO':>4} {'batch':>5} precision")
    for name, path in shipped.configs().items():
        config = json.loads(path.read_text(encoding="utf-8"))
        optimizer, batch = config["optimizer"], config.get("train_batch_size", "")
        rank, lr = (optimizer["params"].get(key, "") for key in ("rank", "lr"))
        stage, precision = ds_json.zero_stage(config), ds_json.precision(config)
        print(f"{name:<24} {optimizer['type']:<16} {rank:>4} {lr:>7} {stage:>4} {batch:>5} {precision}")
    return 0


# plan ---------------------------------------------------------------------------------------------------------------


def _plan_options(parser: argparse.ArgumentParser) -> None:
    from lorapre_dist.planner.command import options

    options(parser)


def _plan(options: argparse.Namespace) -> int:
    from lorapre_dist.planner.command import run

    return run(options)


# programs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What reads its own command line.

    Attributes:
        what, example: as of a :class:`Command`.
        main: runs it; the exit code, unless it ends this process.
    """

    what: str
    example: str
    main: Callable[[Sequence[str]], int]


def _pretrain(argv: Sequence[str]) -> int:
    from lorapre_dist.training.run import app, program

    program.script(lambda: app.main(argv))


def _finetune(argv: Sequence[str]) -> int:
    from lorapre_dist.training.finetune import app
    from lorapre_dist.training.run import program

    program.script(lambda: app.main(argv))


def _launch(argv: Sequence[str]) -> int:
    from lorapre_dist.launcher.app import main

    return main(argv)


PROGRAMS = {
    "pretrain": Program(
        "pre-train a causal LM; on several ranks: deepspeed --module lorapre_dist pretrain ..., torchrun -m ...",
        "--model llama-tiny --deepspeed_config tiny_zero2 --max_steps 200",
        _pretrain,
    ),
    "finetune": Program(
        "fine-tune a causal LM on questions and answers, and score it by generation; on several ranks likewise",
        "--model llama-hf --deepspeed_config finetune_zero2 --dataset metamath --score gsm8k",
        _finetune,
    ),
    "launch": Program(
        "start pre-training on several hosts: over ssh (pdsh), torchrun, MPI or Slurm",
        "cluster.ini --launcher pdsh",
        _launch,
    ),
}
COMMANDS = {
    "configs": Command(
        "list the DeepSpeed configurations that are shipped, or copy them",
        "--copy .",
        _configs_options,
        _configs,
    ),
    "plan": Command(
        "memory per rank and bytes sent per step of a training run, for any world size and without devices",
        "--model llama-7b --stage 2 --world_size 64 --rank 1024",
        _plan_options,
        _plan,
    ),
    "consolidate": Command(
        "write a checkpoint as safetensors: a model folder for transformers, and the optimizer state",
        "runs/llama/checkpoints/step0010000 llama-hf --dtype bf16",
        _consolidate_options,
        _consolidate,
    ),
    "inspect": Command(
        "show what is in a checkpoint or a tokenised corpus and whether it is whole (exit code 1 if not)",
        "runs/llama/checkpoints",
        _inspect_options,
        _inspect,
    ),
    "tokenize": Command(
        "write a corpus as files of token ids, to train from with --dataset OUT",
        "--dataset c4 --tokenizer t5-base --max_tokens 13100000000 --workers 16 c4-tokens",
        _tokenize_options,
        _tokenize,
    ),
}


NAMES = (*PROGRAMS, *COMMANDS)


def _top_parser() -> Parser:
    width, commands = max(map(len, NAMES)), dict[str, Any]({**PROGRAMS, **COMMANDS})
    shown = [
        f"  {name:<{width}}  {c.what}\n{'':<{width + 4}}lorapre {name} {c.example}" for name, c in commands.items()
    ]
    parser = Parser(
        prog="lorapre",
        usage="lorapre COMMAND ...   (lorapre COMMAND --help lists its options)",
        description="Train with LoRA-Pre, plan such runs, and work with their checkpoints and data.",
        epilog="commands, each with an example:\n" + "\n".join(shown),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lorapre {__version__}")
    return parser


def _parser_of(name: str) -> Parser:
    command = COMMANDS[name]
    parser = Parser(
        prog=f"lorapre {name}",
        description=command.what[0].upper() + command.what[1:] + ".",
        epilog=f"example:\n  lorapre {name} {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names; the exit code.

    0, 1 where ``inspect`` finds a checkpoint damaged, and 2 after one line on stderr about what went wrong. A training
    program has its own codes, and ends this process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given[1:] and given[0].startswith("--local_rank="):  # the deepspeed launcher puts it first
        given.append(given.pop(0))
    if given and given[0] in PROGRAMS:
        return PROGRAMS[given[0]].main(given[1:])
    quiet.deepspeed()  # results alone go to stdout
    try:
        if not given or given[0] not in COMMANDS:
            return _no_command(given)
        code = COMMANDS[given[0]].run(_parser_of(given[0]).parse_args(given[1:]))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (head, say) has seen enough; nothing may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _no_command(given: list[str]) -> int:
    if given and given[0].startswith("-"):
        _top_parser().parse_args(given)
    if not given or given[0].startswith("-"):
        raise ConfigError(f"name a command: {', '.join(NAMES)} (see lorapre --help)")
    near = difflib.get_close_matches(given[0], NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(NAMES)}"
    raise ConfigError(f"unknown command {given[0]!r}: {hint}")
