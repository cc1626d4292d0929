"""Settings that somebody got wrong, by the hundred: each is taken for what it says, or refused in one line."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lorapre_dist.config import ConfigError
from lorapre_dist.config.ds_json import precision, zero_stage
from lorapre_dist.config.ds_training import clipping
from lorapre_dist.integrations.deepspeed.bind import check_config
from lorapre_dist.launcher import app
from lorapre_dist.optimizers import OPTIMIZERS
from lorapre_dist.training.finetune import settings as finetune
from lorapre_dist.training.run import program, settings
from tests.launch.conftest import REPO

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "steps_per_print": 1000,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "communication_data_type": "fp32",
    "optimizer": {
        "type": "LoRAPre",
        "params": {"lr": 0.01, "rank": 16, "betas": [0.9, 0.99], "target_modules": ["q_proj"], "weight_decay": 0.1},
    },
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "checkpoint": {"tag_validation": "Warn", "load_universal": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "tensorboard": {"enabled": False, "output_path": "logs/", "job_name": "train"},
    "flops_profiler": {"enabled": False, "profile_step": 1},
}
#: What stands where something else belongs.
VALUES = [
    *(
        None,
        True,
        False,
        "auto",
        "",
        "x",
        "true",
        "false",
        "0.1",
        "1e-3",
        "nan",
        "LoRAPre",
        "AdamW",
        "é" * 9,
        "x" * 300,
    ),
    *(0, 1, -1, 3, 2.5, -0.5, 1e300, 1e-300, 10**30, 10**400, float("nan"), float("inf"), "\0", "a\nb"),
    *(
        [],
        [1],
        ["auto"],
        [[]],
        {},
        {"a": 1},
        {"enabled": True},
        {"enabled": "auto"},
        {"stage": "3"},
        {"type": "LoRAPre"},
    ),
]


@pytest.fixture
def count(exhaustive: bool) -> int:
    """How many mutants of each kind."""
    return 3000 if exhaustive else 300


def one_line(check: Callable[[], Any], seen: str) -> Any:
    """What the check returns, or None if it refuses in one line; anything else fails and shows the mutant."""
    try:
        return check()
    except ConfigError as error:
        assert str(error) and "\n" not in str(error), seen
        return None
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} of {seen}") from error


def typo(word: str, rng: random.Random) -> str:
    """The word with one letter dropped, doubled, changed or swapped."""
    place = rng.randrange(max(1, len(word)))
    before, letter, after = word[:place], word[place : place + 1], word[place + 1 :]
    return before + rng.choice(["", letter * 2, "s", after[:1] + letter]) + after


def garbled(text: str, rng: random.Random) -> bytes:
    """Some text cut, or with other bytes in it, or in another encoding."""
    data, place = text.encode(), rng.randrange(len(text))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.choice([1, 2, 30])) + data[place:]
    if kind == 2:
        return (
            data[:place]
            + rng.choice([b"{", b"}", b"[", b"]", b'"', b",", b":", b"#", b"/*", b"'''", b"%", b"="])
            + data[place:]
        )
    if kind == 3:
        return data[:place] + data[place + rng.choice([1, 5, 40]) :]
    return text.encode(rng.choice(["utf-8-sig", "utf-16", "utf-32", "utf-7"]))


# the DeepSpeed JSON -------------------------------------------------------------------------------------------------


def sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from sections(value)


def mutated(rng: random.Random) -> dict[str, Any]:
    """The configuration with up to three things wrong in it."""
    config = copy.deepcopy(CONFIG)
    config["optimizer"]["type"] = rng.choice(list(OPTIMIZERS) + ["LoRAPre"] * 5 + ["AdamW"])
    for _ in range(rng.choice([1, 1, 2, 3])):
        section = rng.choice([s for s in sections(config) if s])
        key = rng.choice(list(section))
        kind = rng.randrange(5)
        if kind <= 1:
            section[key] = rng.choice(VALUES)
        elif kind == 2:
            section[typo(key, rng)] = section.pop(key)
        elif kind == 3:  # to where it does not belong
            rng.choice(list(sections(config)))[key] = copy.deepcopy(section.pop(key))
        else:
            del section[key]
    return config


def written(rng: random.Random) -> bytes:
    config = mutated(rng)
    text = json.dumps(config, indent=rng.choice([None, 1]))
    if rng.random() < 0.3:
        return garbled(text, rng)
    if rng.random() < 0.05:
        return (b'{"a":' if rng.random() < 0.5 else b"[") * 100_000
    return text.encode()


def test_the_deepspeed_json(tmp_path, count):
    """A program takes it as DeepSpeed does, value for value, or refuses it; so does the library."""
    from deepspeed.runtime.config import DeepSpeedConfig

    rng, path, taken = random.Random(0), tmp_path / "ds.json", 0
    for number in range(count):
        path.write_bytes(written(rng))
        source = str(path)
        if rng.random() < 0.1:
            source = base64.urlsafe_b64encode(path.read_bytes()).decode()
        seen = f"mutant {number}: {path.read_bytes()!r}"[:5000]
        one_line(lambda source=source: check_config(source), seen)
        one_line(lambda source=source: finetuned(source), seen)
        options = ["--deepspeed_config", source, "--backend", rng.choice(settings.BACKENDS)]
        found = one_line(lambda options=options: checked(options), seen)
        if found is None:
            continue
        taken += 1
        config = found.ds_config
        theirs = DeepSpeedConfig({**config, "train_batch_size": found.batch.global_batch})
        ours = (
            zero_stage(config),
            precision(config),
            clipping(config),
            found.batch.micro_batch,
            found.batch.accumulation,
        )
        kind = "bf16" if theirs.bfloat16_config.enabled else "fp16" if theirs.float16_config.enabled else "fp32"
        sizes = (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps)
        assert ours == (theirs.zero_optimization_stage, kind, float(theirs.gradient_clipping), *sizes), seen
    assert 0.05 * count < taken < 0.9 * count


def finetuned(source: str) -> Any:
    """What fine-tuning makes of it for each optimizer."""
    config = finetune.read_deepspeed_config(source)
    return [finetune.with_optimizer(config, name) for name in (None, *finetune.OPTIMIZERS)]


def checked(options: list[str]) -> settings.Settings:
    """What a program does with its command line before it builds anything."""
    found = settings.load_settings(options, 1)
    program.check_config(found)
    return found


# flags --------------------------------------------------------------------------------------------------------------

WORDS = [
    *("", "x", "0", "1", "-1", "2", "3.5", "1e-3", "1e400", "nan", "inf", "-inf", "9" * 5000, "true", "None", "auto"),
    *("-", "--", "--lr", "/", ".", "..", "~", "*", "?", "[", "a/b", "a/b/c", "é", "a\nb", "\\", "x" * 300, "/x" * 3000),
    *(
        "llama-tiny",
        "builtin",
        "c4",
        "deepspeed",
        "ddp",
        "lora",
        "/dev/null",
        "/proc/self/mem",
        "/dev/null/x/y",
        "{query}",
    ),
]


def command_line(parser: Any, base: list[str], rng: random.Random) -> list[str]:
    words = list(base)
    for _ in range(rng.choice([1, 1, 2, 4])):
        action = rng.choice([a for a in parser._actions if "--help" not in a.option_strings])
        option = rng.choice(action.option_strings)
        option = typo(option, rng) if rng.random() < 0.1 else option
        value = rng.choice(WORDS + [str(c) for c in action.choices or ()])
        more = [f"{option}={value}"] if rng.random() < 0.3 else [option, value]
        words[:] = [*words, *more] if rng.random() < 0.8 else [*more, *words]
        if rng.random() < 0.1:
            del words[rng.randrange(len(words))]
    return words


@pytest.mark.parametrize("which", [settings, finetune], ids=["pretrain", "finetune"])
def test_flags(which, tmp_path, count, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    base = ["--deepspeed_config", str(REPO / "ds_configs" / "finetune_tiny_zero2.json")]
    base += ["--model", "model" if which is finetune else "llama-tiny"]
    rng, parser, taken = random.Random(1), which.build_parser(), 0
    for number in range(count):
        words = command_line(parser, base, rng)
        seen = f"mutant {number}: {words!r}"[:3000]
        taken += one_line(lambda words=words: which.load_settings(words, 1), seen) is not None
    assert 0.05 * count < taken < 0.9 * count


# cluster.ini --------------------------------------------------------------------------------------------------------


def settings_file(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.choice([k for k, line in enumerate(lines) if line and not line.startswith("#")])
        name, equals, value = lines[place].partition(" =")
        kind = rng.randrange(6)
        if kind <= 1 and equals:
            lines[place] = f"{name} = {rng.choice([*WORDS, '²', '٣', '22 # ssh', '%(x)s', '${x}', 'yes'])}"
        elif kind == 2:
            lines[place] = typo(name, rng) + equals + value
        elif kind == 3:
            del lines[place]
        elif kind == 4:
            lines.insert(rng.randrange(len(lines)), lines[place])
        else:
            lines[place] = rng.choice(["[", "]", "[]", "=", " x", "[hosts]x", "[DEFAULT]", "a" * 5000]) + lines[place]
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return garbled(text, rng) if rng.random() < 0.2 else text.encode()


def test_the_settings_file_of_several_hosts(tmp_path, count, monkeypatch):
    """``launch/run.py FILE --dry_run``: the command, or exit code 2 and one line on stderr."""
    monkeypatch.chdir(tmp_path)  # and back: the program goes to the repository
    (tmp_path / "hosts").write_text("host-a slots=2\nhost-b slots=2\n")
    text = (REPO / "launch" / "cluster.ini").read_text()
    text = text.replace("hostfile = hosts", f"hostfile = {tmp_path}/hosts")
    rng, path, taken = random.Random(2), tmp_path / "cluster.ini", 0
    for number in range(count):
        path.write_bytes(settings_file(text, rng))
        launcher = rng.choice(app.LAUNCHERS)
        seen = f"mutant {number}, {launcher}: {path.read_bytes()!r}"
        said, wrong = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            code = one_line(lambda launcher=launcher: app.main([str(path), "--launcher", launcher, "--dry_run"]), seen)
        taken += code == 0
        if code == 0:
            assert said.getvalue() and not wrong.getvalue(), seen
        else:
            assert code == 2 and wrong.getvalue().startswith("error: ") and wrong.getvalue().count("\n") == 1, seen
    assert 0.05 * count < taken < 0.9 * count
