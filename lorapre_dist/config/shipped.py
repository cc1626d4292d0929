"""Files that come with the package: DeepSpeed configurations, and what a run on several hosts is started with.

``lorapre_dist/shipped`` has links to ``ds_configs`` and to files of ``launch`` in the repository; a wheel holds the
files themselves.
"""

from __future__ import annotations

import difflib
import os
import shutil
from importlib import resources
from pathlib import Path

from .checks import ConfigError

#: Copied with the configurations: settings of the launchers, with what they need.
LAUNCH_FILES = ("cluster.ini", "slurm.sbatch", "deepspeed_env.example")


def package() -> Path:
    """The folder of the package."""
    return Path(str(resources.files("lorapre_dist")))


def file(name: str) -> Path:
    """A shipped file: one of :data:`LAUNCH_FILES`, or the script ``pretrain.py`` that every rank runs."""
    return package() / "shipped" / name


def configs() -> dict[str, Path]:
    """The DeepSpeed configurations by name: ``llama_60m_zero2``."""
    return {path.stem: path for path in sorted(file("ds_configs").glob("*.json"))}


def located(source: str | Path) -> str | Path:
    """The path of a shipped configuration where ``source`` is its name or file name, and no such file is here."""
    if os.path.exists(source):
        return source
    return configs().get(str(source).removesuffix(".json"), source)


def nearest(source: str | Path) -> str:
    """What to add to a message that there is no file ``source``: the shipped configuration that may be meant."""
    near = difflib.get_close_matches(Path(source).stem, configs(), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}, which is shipped? (lorapre configs lists all)" if near else ""


def copy(folder: Path, overwrite: bool = False) -> list[Path]:
    """Copy all of them into ``folder``, which is made if need be; the copies.

    Raises:
        ConfigError: another file of such a name is there, and ``overwrite`` is false. Then nothing is copied.
    """
    pairs = [(source, folder / source.name) for source in (*configs().values(), *map(file, LAUNCH_FILES))]
    changed = [new for source, new in pairs if new.exists() and new.read_bytes() != source.read_bytes()]
    if changed and not overwrite:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(f"{changed[0]}{more}: is there and differs; --overwrite replaces it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for source, new in pairs:
        shutil.copyfile(source, new)
        shutil.copymode(source, new)
    return [new for _, new in pairs]
