"""The settings file of a run on several hosts: an INI file, checked before any host is asked for anything."""

from __future__ import annotations

import configparser
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapre_dist.config import ConfigError

SECTIONS = {
    "hosts": ("hostfile", "interface", "ssh_port", "master_port", "threads"),
    "environment": None,  # any variable
    "torchrun": ("min_hosts", "restarts"),
    "slurm": None,  # any option of sbatch
    "pretrain": None,  # any option of lorapre pretrain, which checks them itself
}
DEFAULT_OUTPUT = "runs/pretrain"
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WHOLE = re.compile(r"[0-9]{1,9}")
SWITCHES = {"true": True, "yes": True, "on": True, "": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class ClusterSettings:
    """What all launchers read.

    Attributes:
        hostfile: lines ``name slots=N``; unused under Slurm, which knows its hosts.
        interface: network between the hosts; empty: whatever gloo, NCCL and MPI choose.
        threads: ``OMP_NUM_THREADS`` of each rank.
        environment: variables for every rank.
        min_hosts: with how many hosts torchrun goes on after losing others (None: all are needed).
        restarts: how often torchrun starts the ranks again.
        slurm: options for sbatch.
        pretrain: command line of ``lorapre pretrain``.
    """

    path: Path
    hostfile: str
    interface: str
    ssh_port: int | None
    master_port: int
    threads: int
    environment: dict[str, str]
    min_hosts: int | None
    restarts: int
    slurm: list[str]
    pretrain: list[str]

    @property
    def output_dir(self) -> Path:
        """Where the run writes; relative to the folder that the front was started in."""
        return Path(self.option("output_dir") or DEFAULT_OUTPUT)

    def option(self, name: str) -> str | None:
        """The value of an option of ``lorapre pretrain``; of several the last, as argparse takes it."""
        found = None
        for place, word in enumerate(self.pretrain):
            if word == f"--{name}":
                found = next(iter(self.pretrain[place + 1 :]), None)
            elif word.startswith(f"--{name}="):
                found = word.split("=", 1)[1]
        return found


def read_settings(path: str, more: Sequence[str] = ()) -> ClusterSettings:
    """Read the file; ``more`` follows its options for ``lorapre pretrain`` and so overrides them.

    Raises:
        ConfigError: no such file, a line, section, name or value that is not understood.
    """
    file = configparser.ConfigParser(interpolation=None, comment_prefixes=("#", ";"), allow_no_value=True)
    file.optionxform = str  # type: ignore[assignment,method-assign]  # names of variables are case-sensitive
    try:
        with open(path, encoding="utf-8") as stream:
            file.read_file(stream)
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path}: {' '.join(str(error).split())}") from error
    except AttributeError as error:  # the parser's own answer to a continued line under a name without a value
        raise ConfigError(f"settings file {path}: a line is indented under a name that has no value") from error
    _check_names(path, file)

    def get(section: str, name: str, default: str = "") -> str:
        value = file.get(section, name, fallback=None)
        return default if value is None or not value.strip() else value.strip()

    def number(section: str, name: str, default: int, least: int, most: int) -> int:
        text = get(section, name, str(default))
        if not WHOLE.fullmatch(text) or not least <= int(text) <= most:
            raise ConfigError(f"{path}: [{section}] {name} = {text}: must be a whole number from {least} to {most}")
        return int(text)

    variables = list(file["environment"]) if file.has_section("environment") else []
    for name in variables:
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"{path}: [environment] {name}: not the name of an environment variable")
    settings = ClusterSettings(
        path=Path(path),
        hostfile=get("hosts", "hostfile", "hosts"),
        interface=get("hosts", "interface"),
        ssh_port=number("hosts", "ssh_port", 22, 1, 65535) if get("hosts", "ssh_port") else None,
        master_port=number("hosts", "master_port", 29500, 1024, 65535),
        threads=number("hosts", "threads", 1, 1, 4096),
        environment={name: get("environment", name) for name in variables},
        min_hosts=number("torchrun", "min_hosts", 1, 1, 100000) if get("torchrun", "min_hosts") else None,
        restarts=number("torchrun", "restarts", 3, 0, 1000),
        slurm=_options(file, "slurm"),
        pretrain=[*_options(file, "pretrain"), *more],
    )
    if settings.option("output_dir") is None:  # by which a run's processes are told from another's
        settings.pretrain.extend(["--output_dir", DEFAULT_OUTPUT])
    return settings


def _check_names(path: str, file: configparser.ConfigParser) -> None:
    for section in file.sections():
        if section not in SECTIONS:
            near = difflib.get_close_matches(section, SECTIONS, n=1)
            hint = f"did you mean [{near[0]}]? " if near else ""
            raise ConfigError(f"{path}: unknown section [{section}]: {hint}known: {', '.join(SECTIONS)}")
        known = SECTIONS[section]
        for name in file[section]:
            if known is not None and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ConfigError(f"{path}: [{section}] {name} is unknown: {hint}known: {', '.join(known)}")


def _options(file: configparser.ConfigParser, section: str) -> list[str]:
    """``name = value`` as ``--name value``, ``name = true`` (or nothing) as ``--name``; ``false`` leaves it out."""
    words: list[str] = []
    for name, value in file[section].items() if section in file else ():
        switch = SWITCHES.get((value or "").strip().lower())
        if switch is None:
            words += [f"--{name}={value.strip()}"] if section == "slurm" else [f"--{name}", value.strip()]
        elif switch:
            words.append(f"--{name}")
    return words
