"""One writer at a time in a folder: a lock of the kernel's on a file in it, which dies with its holder.

``flock`` itself, also over NFS. (The library filelock falls back to a file that stays behind when its owner is killed.)
A process that is forked from the holder does not have the lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
import warnings
from pathlib import Path

FILE = ".lock"
#: Seconds to wait for a holder that is just ending.
WAIT = 5.0
# Open lock files by folder.
_taken: dict[str, int] = {}


def take(folder: Path, wait: float | None = None) -> str | None:
    """Take the lock of ``folder``, which is there; None, or who holds it: host, process and since when.

    A process that has it already keeps it. Where the file system knows no locks there is a warning, and no lock.

    Args:
        wait: seconds to wait for it; default: :data:`WAIT`.

    Raises:
        OSError: no file can be written there.
    """
    place, end = os.path.abspath(folder), time.monotonic() + (WAIT if wait is None else wait)
    while place not in _taken:
        handle = os.open(f"{place}/{FILE}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FileExistsError(errno.EEXIST, "the lock is no file", f"{place}/{FILE}")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 300, 0).decode(errors="replace")
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run there", stacklevel=2)
                return None
            if time.monotonic() >= end:
                return holder or "an unknown process"
            time.sleep(0.1)
            continue
        if not _is_current(place, handle):  # its last holder has removed it meanwhile
            os.close(handle)
            continue
        text = f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}"
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
        _taken[place] = handle
    return None


def has(folder: Path) -> bool:
    """Whether this process has the lock of ``folder``."""
    return os.path.abspath(folder) in _taken


def release(folder: Path) -> None:
    """Give the lock of ``folder`` back, if this process has it."""
    place = os.path.abspath(folder)
    if (handle := _taken.pop(place, None)) is not None:
        if _is_current(place, handle):
            os.unlink(f"{place}/{FILE}")
        os.close(handle)


def _is_current(place: str, handle: int) -> bool:
    """Whether the open file is still the one that others would lock."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(f"{place}/{FILE}"))
    except OSError:
        return False


def _forget() -> None:
    """In a forked child: else the lock would live as long as the child."""
    for handle in _taken.values():
        os.close(handle)
    _taken.clear()


os.register_at_fork(after_in_child=_forget)
