"""Reading what may have been damaged, or made by somebody else: regular files, no larger than they look, and no code.

Everything that is wrong with a file becomes a :class:`CheckpointError` of one line.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import stat
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

#: What DeepSpeed's own files hold beside tensors and plain values.
_DEEPSPEED_RECORDS = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
# What torch reads instead of running the code that a caller of torch.load, DeepSpeed say, would let it run.
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# In what torch says of a pickle that it does not load.
_ASKED = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
_REFUSED = "WeightsUnpickler error:"
#: Bytes of JSON that are read: parameters of the largest models come to some ten million.
JSON_BYTES = 256 << 20
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or used. The message names the folder and what is wrong with it."""


def kind(mode: int) -> str | None:
    """What a file of this ``st_mode`` is, None for a regular one."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no regular file")


def opened(path: Path) -> BinaryIO:
    """A regular file, for reading; nothing else is opened: a FIFO would wait for ever, a link may lead anywhere.

    Raises:
        CheckpointError: it is something else.
        OSError: it is not there or cannot be opened.
    """
    if found := kind(os.lstat(path).st_mode):
        raise CheckpointError(f"{shown(str(path))} is {found}, not a file")
    # Should it have been replaced since: neither follow nor wait.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW))


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """A regular file of UTF-8 text.

    Raises:
        CheckpointError: it is something else, or has more than ``limit`` bytes.
        FileNotFoundError: it is not there.
    """
    try:
        with opened(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > limit:
        raise CheckpointError(f"{path} cannot be read (more than {limit:,} bytes)")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read (not UTF-8 at byte {error.start})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A regular file that holds a JSON object. Raises as :func:`read_text`."""
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} cannot be read (nested too deeply)") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read (it holds no JSON object)")
    return found


class Slice(io.RawIOBase):
    """``size`` bytes of an open file from ``start``, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position in the slice."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``, or as much of it as there is; the number of bytes."""
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        read: int = self._file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._at += read
        return read


def load_archive(file: Any, size: int, what: str, to: str = "cpu") -> Any:
    """What ``torch.save`` wrote to ``file``, an archive of ``size`` bytes: tensors and plain values, in host memory.

    ``torch.save`` compresses nothing, so neither reading nor what was read takes more than ``size`` bytes.

    Args:
        to: "meta" reads shapes and types alone.

    Raises:
        CheckpointError: it is something else; ``what`` names it.
    """
    import torch  # not for who only asks for a folder

    try:
        check_stored(file, size)
        file.seek(0)
        return torch.load(file, map_location=to, weights_only=True)
    except Exception as error:  # zipfile, pickle and torch raise many kinds on what is no such archive
        reason = str(error) if isinstance(error, CheckpointError) else first_line(error)
        raise CheckpointError(f"{what} cannot be read ({reason})") from error


def check_stored(file: BinaryIO | Slice, size: int) -> None:
    """Raise a CheckpointError if the members of an archive take more than its ``size`` bytes when they are read."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise CheckpointError(f"it would take more than its {size:,} bytes of memory")


@contextmanager
def weights_only(folder: Path) -> Iterator[None]:
    """Let DeepSpeed load its own files in ``folder`` without running what they ask for.

    Within, every ``torch.load`` of this process reads tensors, plain values and DeepSpeed's own records, whatever its
    caller asks for. The files are looked at first: regular ones, that take no more memory than they have bytes.

    Raises:
        CheckpointError: a file is not so.
    """
    import torch  # not for who only asks for a folder

    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if (found := kind(path.lstat().st_mode)) not in (None, "a folder"):
            raise CheckpointError(f"{shown(str(path))} is {found}, not a file")
        if path.suffix == ".pt":
            with opened(path) as file:
                if zipfile.is_zipfile(file):
                    try:
                        check_stored(file, path.stat().st_size)
                    except (CheckpointError, zipfile.BadZipFile) as error:
                        raise CheckpointError(f"{path} cannot be read ({error})") from error
    # Where DeepSpeed has not been imported nothing of it can be asked for.
    present = [(sys.modules[module], names) for module, names in _DEEPSPEED_RECORDS.items() if module in sys.modules]
    records: list[Any] = [getattr(module, name) for module, names in present for name in names]
    records.append((enum_member, "builtins.getattr"))
    with ExitStack() as stack:
        stack.enter_context(torch.serialization.safe_globals(records))
        before = os.environ.get(_WEIGHTS_ONLY)
        os.environ[_WEIGHTS_ONLY] = "1"
        try:
            yield
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read ({first_line(error)})") from error
        finally:
            if before is None:
                del os.environ[_WEIGHTS_ONLY]
            else:
                os.environ[_WEIGHTS_ONLY] = before


def enum_member(enum: Any, name: Any) -> Enum:
    """A member of an enum, in place of the ``getattr`` by which Python up to 3.11.3 asks for it."""
    if not (isinstance(enum, type) and issubclass(enum, Enum) and name in list(enum.__members__)):
        raise pickle.UnpicklingError(f"getattr({enum!r}, {name!r}) has no place in a checkpoint")
    return enum[name]


def is_inside(name: Any) -> bool:
    """Whether ``name`` is the relative path of a file in a folder, in its plain form."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number that counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def shown(name: str) -> str:
    """A file's name as it can be printed anywhere."""
    return name if name.isprintable() else ascii(name)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error; of torch's advice on pickles what was refused."""
    text = str(error).strip()
    if (asked := _ASKED.search(text)) is not None:
        return f"it asks for {asked[1]}, which has no place there"
    line = text.partition(_REFUSED)[2].strip() or text
    return f"{type(error).__name__}: {line.splitlines()[0] if line else ''}"
