"""Tensors of a checkpoint to safetensors files, one part of one tensor in memory at a time.

The library's ``save_file`` takes whole tensors. A tensor that several ranks wrote would be in memory besides the part
that it is put together from, so the files are written here: eight bytes with the length of the header, the header in
JSON, the elements (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import folder
from .files import CheckpointError
from .stored import Part, StoredTensor

#: Bytes of tensors in one file, unless a single tensor is larger.
FILE_BYTES = 100_000_000
# Elements that are converted to another type at a time.
_PIECE = 1 << 22
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        shape: to declare; the order of the elements stays.
        dtype: to convert to.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: StoredTensor

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(into: Path, stem: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """Write ``STEM-00001-of-0000N.safetensors`` and ``STEM.safetensors.index.json`` in folder ``into``; the index.

    Raises:
        CheckpointError: a tensor cannot be represented.
        OSError: a file cannot be written.
    """
    files = list(_grouped(entries))
    weight_map = {}
    for number, group in enumerate(files, 1):
        name = f"{stem}-{number:05}-of-{len(files):05}.safetensors"
        _write_file(into / name, group)
        weight_map.update({entry.name: name for entry in group})
    index = {"metadata": {"total_size": sum(e.bytes for group in files for e in group)}, "weight_map": weight_map}
    folder.write_json(into / f"{stem}.safetensors.index.json", index)
    return index


def _grouped(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        if group and sum(e.bytes for e in group) + entry.bytes > FILE_BYTES:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _write_file(path: Path, entries: list[Entry]) -> None:
    # Wider elements first: then each tensor begins at a multiple of its element size.
    entries = sorted(entries, key=lambda e: -e.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = [], 0
    for entry in entries:
        if entry.dtype not in _TYPES:
            raise CheckpointError(f"{entry.name}: safetensors has no type for {entry.dtype}")
        begins.append(end)
        end += entry.bytes
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begins[-1], end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        data = file.tell()
        file.truncate(data + end)
        for entry, begin in zip(entries, begins, strict=True):
            for part in entry.source.parts:
                _write_part(file, data + begin, entry, part)
        file.flush()
        os.fsync(file.fileno())


def _write_part(file: BinaryIO, begin: int, entry: Entry, part: Part) -> None:
    tensor = part.read()
    width = math.prod(entry.source.shape[1:])
    if part.shape[1:] == entry.source.shape[1:]:
        runs = [(part.offsets[0] * width if part.offsets else 0, tensor.reshape(-1))]
    else:  # some columns of a matrix: a run in each row
        runs = [((part.offsets[0] + i) * width + part.offsets[1], row) for i, row in enumerate(tensor)]
    for position, run in runs:
        file.seek(begin + position * entry.dtype.itemsize)
        for piece in run.split(_PIECE):
            file.write(_bytes(piece, entry))


def _bytes(piece: Tensor, entry: Entry) -> Any:
    converted = piece.to(entry.dtype).contiguous()
    if entry.dtype == torch.float16 and bool((converted.isinf() & ~piece.isinf()).any()):
        raise CheckpointError(f"{entry.name} has elements beyond fp16's 65504; use bf16")
    array: Any = converted.view(torch.uint8).numpy()
    return memoryview(array)
