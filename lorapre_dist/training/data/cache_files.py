"""Writing cache entries so that a killed or concurrent writer leaves no half-written one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lorapre_dist.config import ConfigError


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, made by ``build(temporary_folder)`` in the first process that asks; the others wait for it.

    The lock is the operating system's, so a killed process does not leave it held; the folder appears at once
    by a rename.

    Raises:
        ConfigError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if folder.is_dir():
                return folder
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                build(temporary)
                # mkdtemp makes it private; others in the group may share the cache.
                temporary.chmod(0o755)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"--data_cache {folder.parent.parent}: cannot be written: {error}") from error
    return folder
