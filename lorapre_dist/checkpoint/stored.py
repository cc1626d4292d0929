"""A checkpoint as it lies on storage, read by one process and part by part: nothing here is collective."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from ..core.factors import state_shapes
from ..core.rounding import COMPENSATION
from ..state.shards import MODEL, OPTIMIZER, UNTRAINED
from . import content, dcp, files, folder
from .entries import Entry, LowRank, Trained
from .files import CheckpointError
from .folder import Manifest

#: Where the training program puts checkpoints in a run's folder.
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Part:
    """What one rank wrote of a tensor: elements from ``offsets``, of ``shape``, in a slice of a file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    bytes: int

    def read(self, to: str = "cpu") -> Tensor:
        """The elements, in host memory; with "meta" nothing but a check that they are there.

        Raises:
            CheckpointError: they are not.
        """
        with files.opened(self.file) as file:
            return dcp.read_part(file, self.start, self.bytes, self.shape, self.dtype, to)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, whole.

    Attributes:
        shape: as stored; weights and ``exp_avg`` are 1-D, in row-major order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the stored type."""
        return self.numel * self.dtype.itemsize


def joined(pieces: list[StoredTensor]) -> StoredTensor:
    """1-D tensors of one size and dtype, one behind the other."""
    size = pieces[0].numel
    parts = [replace(p, offsets=(p.offsets[0] + k * size,)) for k, piece in enumerate(pieces) for p in piece.parts]
    return StoredTensor((len(pieces) * size,), pieces[0].dtype, tuple(parts))


def tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of checkpoint ``path`` by its name there (``model.NAME``, ``optimizer.NAME.m_B``, ...).

    Raises:
        CheckpointError: the list of tensors cannot be read.
    """
    metadata = dcp.Reader(path / content.TENSORS).read_metadata()
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # the reader takes no other
        dtype, parts = entry.properties.dtype, []
        for chunk in entry.chunks:
            at = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            file = path / content.TENSORS / at.relative_path
            parts.append(Part(tuple(chunk.offsets), tuple(chunk.sizes), dtype, file, at.offset, at.length))
        found[name] = StoredTensor(tuple(entry.size), dtype, tuple(parts))
    return found


def expected(parameters: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Real shape of every tensor that a checkpoint with these ``parameters`` must hold, by its name there."""
    found: dict[str, tuple[int, ...]] = {}
    for name, entry in parameters.items():
        if not isinstance(entry, Trained):
            found[UNTRAINED + name] = entry.shape
            continue
        state: dict[str, tuple[int, ...]] = {"exp_avg": entry.shape, "exp_avg_sq": entry.shape}
        if isinstance(entry, LowRank):
            p, q = entry.shape
            state = state_shapes((p, q), entry.ranks, entry.vectors, entry.forms)
        if entry.compensated:
            state[COMPENSATION] = (*entry.shape, 2)
        found[MODEL + name] = entry.shape
        found.update({f"{OPTIMIZER}{name}.{key}": shape for key, shape in state.items()})
    return found


def complete(
    path: Path, described: content.Content, share: slice = slice(None)
) -> tuple[dict[str, StoredTensor], dict[str, tuple[int, ...]]]:
    """Every tensor of checkpoint ``path`` (:func:`tensors`), and their real shapes (:func:`expected`).

    Args:
        described: its ``checkpoint.json``.
        share: of all parts, those whose shape and type in the file is looked at.

    Raises:
        CheckpointError: some are not there in full.
    """
    found, shapes = tensors(path), expected(described.parameters)
    if missing := incomplete(found, shapes):
        raise CheckpointError(f"checkpoint {path} is damaged: " + "; ".join(missing[:8]))
    parts = [part for name in sorted(found) for part in found[name].parts]
    for part in parts[share]:
        part.read("meta")
    return found, shapes


def incomplete(stored: dict[str, StoredTensor], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """Tensors of ``wanted`` (:func:`expected`) that are not there in full, in words."""
    found = []
    for name, shape in wanted.items():
        numel, tensor = math.prod(shape), stored.get(name)
        if tensor is None:
            # A tensor without elements is written by no rank.
            found += [f"tensor {name} is missing"] if numel else []
        elif tensor.shape not in (shape, (numel,), (numel // 2, 2)):  # weights and exp_avg are flat, pairs of bytes too
            found.append(f"tensor {name} is stored as {tensor.shape} instead of {shape}")
        elif (held := sum(math.prod(part.shape) for part in tensor.parts)) != numel:
            found.append(f"tensor {name} has {held} of its {numel} elements")
        elif not _one_behind_the_other(tensor):
            found.append(f"tensor {name} has elements twice, and others not at all")
    return found


def _one_behind_the_other(tensor: StoredTensor) -> bool:
    """Whether the parts, which have as many elements as the tensor, cover it: each is a run along one dimension."""
    parts = sorted(tensor.parts, key=lambda part: part.offsets)
    for dim in range(len(tensor.shape)):
        rest = tensor.shape[:dim] + tensor.shape[dim + 1 :]
        ends = itertools.accumulate((part.shape[dim] for part in parts), initial=0)
        if all(
            part.offsets[dim] == end and part.shape[:dim] + part.shape[dim + 1 :] == rest
            for part, end in zip(parts, ends, strict=False)
        ):
            return True
    return not tensor.shape


def problems(path: Path) -> list[str]:
    """All that is wrong with a checkpoint, in words; every file is read through."""
    try:
        manifest = Manifest.read(path)
        found = folder.damage(path, manifest)
        if not found and not others(manifest):
            found = incomplete(tensors(path), expected(content.read(path).parameters)) or not_finite(path)
    except (CheckpointError, OSError) as error:
        return [str(error).removeprefix(f"checkpoint {path} ").removeprefix(f"checkpoint {path}: ")]
    return found


def others(manifest: Manifest) -> bool:
    """Whether the files were written by DeepSpeed for an optimizer of its own: what is in them, only it can say."""
    return not any(name in manifest.files for name in (content.FILE, f"{content.TENSORS}/.metadata"))


def not_finite(path: Path, share: slice = slice(None)) -> list[str]:
    """Tensors with elements that are not finite, in words; of the tensors' parts only those in ``share`` are read.

    Since format 2 none is saved, and nothing is read.
    """
    if not (path / content.FILE).is_file() or content.read(path).format > 1:
        return []
    parts = [(name, part) for name, tensor in sorted(tensors(path).items()) for part in tensor.parts]
    return list(dict.fromkeys(f"{name} is not finite" for name, p in parts[share] if not p.read().isfinite().all()))


def tags_in(path: Path) -> Path | None:
    """The folder of checkpoints that ``path`` is, or has as a run's folder; None where ``path`` is a checkpoint.

    Raises:
        CheckpointError: it is none of these.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if any((path / name).exists() for name in (folder.MANIFEST, content.FILE, content.TENSORS)):
        return None
    for directory in (path, path / CHECKPOINTS):
        if os.path.lexists(directory / folder.LATEST) or any(_looks_saved(p) for p in folder.checkpoints(directory)):
            return directory
    raise CheckpointError(f"{path}: neither a checkpoint nor a folder that holds some")


def locate(path: Path) -> Path:
    """The checkpoint that ``path`` is, or the latest one of a run's folder.

    Raises:
        CheckpointError: there is none, or nothing says which is the latest.
    """
    directory = tags_in(path)
    if directory is None:
        return path
    if problem := folder.latest_problem(directory):
        there = ", ".join(p.name for p in folder.checkpoints(directory)) or "none"
        raise CheckpointError(f"{problem}; there: {there}")
    tag = folder.latest(directory)
    assert tag is not None
    return directory / tag


def _looks_saved(path: Path) -> bool:
    return any((path / name).exists() for name in (folder.MANIFEST, content.FILE))
