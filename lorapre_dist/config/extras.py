"""The packages that ``pip install lorapre-dist`` alone leaves out, and one line about one that is missing.

torch and numpy are all that the optimizers need. What else a module or a program imports belongs to an extra of the
same name in ``setup.py``; it calls :func:`need` before that import.
"""

from __future__ import annotations

import importlib.util
import sys

from .checks import ConfigError

DEEPSPEED = ("deepspeed", "hjson", "pydantic")
TRAIN = (
    *DEEPSPEED,
    *("transformers", "datasets", "tokenizers", "filelock", "psutil", "tqdm", "matplotlib", "tensorboard"),
)
#: What is imported, by extra.
EXTRAS = {
    "deepspeed": DEEPSPEED,
    "train": TRAIN,
    "hf": ("transformers", "accelerate"),
    "finetune": (*TRAIN, "peft", "accelerate"),
    "mpi": ("mpi4py",),
    "bench": (*TRAIN, "galore_torch"),
    "wandb": ("wandb",),
}
#: Missing packages that a message names.
SHOWN = 3


class MissingExtra(ConfigError, ImportError):
    """Packages of an extra are not installed; the message is one line with the command that installs them."""


def has(package: str) -> bool:
    """Whether ``package`` can be imported; it is not."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def need(extra: str, *packages: str, why: str | None = None) -> None:
    """Raise unless ``packages`` of ``extra`` (default: all of them) can be imported; imports none.

    Args:
        extra: a key of :data:`EXTRAS`.
        packages: those of it that are used here, as they are imported.
        why: what was asked for that needs them, ``"--wandb"`` say.

    Raises:
        MissingExtra: ``needs transformers: pip install 'lorapre-dist[train]'``.
    """
    missing = [package for package in packages or EXTRAS[extra] if not has(package)]
    if missing:
        named = ", ".join(package.replace("_", "-") for package in missing[:SHOWN])
        named += f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        asked = "" if why is None else f"{why}: "
        raise MissingExtra(f"{asked}needs {named}: pip install 'lorapre-dist[{extra}]'")


def need_or_exit(*extras: str) -> None:
    """As :func:`need`, for the top of a script: ends the process with the line on stderr and exit code 2."""
    try:
        for extra in extras:
            need(extra)
    except MissingExtra as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
