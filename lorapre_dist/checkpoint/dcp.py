"""Tensors to and from storage with ``torch.distributed.checkpoint``: bounded memory, and no code in the metadata."""

from __future__ import annotations

import io
import math
import os
import pickle
import queue
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as Done

from ..state.shards import Shard
from . import files
from .files import CheckpointError

#: Bytes of tensors in one file, unless a single tensor is larger; a file's tensors are in host memory until it is done.
FILE_BYTES = 128 << 20

_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    *((_DCP + "metadata", name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta")),
    *((_DCP + "metadata", name) for name in ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class Writer(dcp.FileSystemWriter):
    """One or more files a rank, each with about ``FILE_BYTES`` of tensors."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Done[list[WriteResult]]:
        """Write this rank's tensors."""
        files: queue.Queue[Any] = queue.Queue()
        for k, items in enumerate(_grouped(plan.items)):
            name = f"{plan.storage_data.prefix}{k}.distcp"
            files.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, files)


class Reader(dcp.FileSystemReader):
    """Reads metadata without running what a pickle may ask for, and of files only what the metadata can truly mean."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the checkpoint.

        Raises:
            CheckpointError: it holds anything but DCP's own records, or they do not fit each other or the files.
        """
        path = Path(self.path) / ".metadata"
        try:
            with files.opened(path) as file:
                metadata = _Unpickler(io.BytesIO(file.read())).load()
            _check(metadata, Path(self.path))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # a pickle can hold anything, anywhere
            raise CheckpointError(f"{path} cannot be read: {files.first_line(error)}") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take in what is stored where."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._described = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Done[None]:
        """Read this rank's tensors."""
        per_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            per_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in per_file.items():
            with files.opened(Path(self.path) / name) as file:
                for item in items:
                    at, entry = self.storage_data[item.storage_index], self._described[item.storage_index.fqn]
                    assert isinstance(entry, TensorStorageMetadata) and item.storage_index.index is not None
                    chunk = entry.chunks[item.storage_index.index]
                    part = read_part(file, at.offset, at.length, tuple(chunk.sizes), entry.properties.dtype)
                    part = narrow_tensor_by_index(part, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Done[None] = Done()
        done.set_result(None)
        return done


def read_part(
    file: BinaryIO, start: int, size: int, shape: tuple[int, ...], dtype: torch.dtype, to: str = "cpu"
) -> torch.Tensor:
    """What one rank wrote of a tensor, in host memory: ``size`` bytes of an open file.

    Args:
        to: "meta" reads its shape and type alone.

    Raises:
        CheckpointError: it is no tensor of ``shape`` and ``dtype``.
    """
    what = f"{Path(file.name).name} at byte {start}"
    tensor = files.load_archive(files.Slice(file, start, size), size, what, to)
    if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.dtype != dtype:
        found = f"{tuple(tensor.shape)}, {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CheckpointError(f"{what}: expected a tensor of {shape}, {dtype}, found {found}")
    return tensor


def _check(metadata: Any, folder: Path) -> None:
    """Raise a CheckpointError, or whatever error, if the records of a checkpoint do not fit each other or the files."""
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"expected {Metadata.__name__}, found {type(metadata).__name__}")
    sizes: dict[str, int] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not isinstance(entry.properties.dtype, torch.dtype):
            raise CheckpointError(f"{name!r:.200} is no tensor")
        width, dims = entry.properties.dtype.itemsize, len(entry.size)
        for chunk in entry.chunks:
            box = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=True))
            inside = all(start >= 0 and size >= 0 and start + size <= whole for start, size, whole in box)
            if not inside or len(chunk.offsets) != dims:
                raise CheckpointError(f"a part of {name!r:.200} lies outside of it")
            at = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            # Every file of a checkpoint lies beside the metadata.
            if not files.is_inside(at.relative_path) or "/" in at.relative_path:
                raise CheckpointError(f"{name!r:.200} is in {at.relative_path!r:.200}, outside of the checkpoint")
            if at.relative_path not in sizes:
                sizes[at.relative_path] = os.lstat(folder / at.relative_path).st_size
            if not (at.offset >= 0 and math.prod(chunk.sizes) * width <= at.length):
                raise CheckpointError(f"{at.length} bytes cannot hold {tuple(chunk.sizes)} elements of {name!r:.200}")
            if at.offset + at.length > sizes[at.relative_path]:
                raise CheckpointError(f"{name!r:.200} lies behind the end of {at.relative_path}")
            if at.transform_descriptors:
                raise CheckpointError(f"{name!r:.200} is not as it was written by this package")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return files.enum_member
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def save(folder: Path, shards: dict[str, Shard], group: Any = None) -> None:
    """Write the shards of all ranks of ``group``; a collective over it."""
    with _quietly():
        dcp.save(shards, storage_writer=Writer(folder), planner=_SavePlanner(), process_group=group, no_dist=_alone())


class _Staged:
    """Stager that copies shards, so that training can go on while they are written."""

    should_synchronize_after_execute = False

    def stage(self, shards: dict[str, Shard]) -> dict[str, Shard]:
        return {
            name: Shard(s.shape, s.start + s.skip, s.owned.detach().to("cpu", copy=True).contiguous(), s.dim)
            for name, s in shards.items()
        }

    def synchronize_staging(self) -> None: ...

    def close(self) -> None: ...


def save_in_background(folder: Path, shards: dict[str, Shard], group: Any) -> Future[Any]:
    """Copy the shards to host memory and write them in a thread; ``group`` (gloo) must serve nothing else meanwhile."""
    if _alone():  # said in the thread, where a context would not reach
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    saved: Any = dcp.async_save(
        shards,
        storage_writer=Writer(folder),
        planner=_SavePlanner(),
        process_group=group,
        async_stager=_Staged(),  # type: ignore[arg-type]
        no_dist=_alone(),
    )
    return saved


def load(folder: Path, shards: dict[str, Shard], group: Any = None, alone: bool = False) -> None:
    """Fill ``shards`` from a checkpoint of any layout; a collective over ``group`` unless ``alone``."""
    reader, planner = Reader(folder), _LoadPlanner()
    with _quietly():
        dcp.load(shards, storage_reader=reader, planner=planner, process_group=group, no_dist=alone or _alone())


def shapes(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Whole shape, type and chunks of every tensor in a checkpoint, by name."""
    found = Reader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def whole(folder: Path, name: str, entry: TensorStorageMetadata, rows: slice | None = None) -> torch.Tensor:
    """One tensor of a checkpoint, or a run of its leading dimension, in host memory."""
    start, stop, _ = (rows or slice(None)).indices(entry.size[0])
    tensor = torch.empty((stop - start, *entry.size[1:]), dtype=entry.properties.dtype)
    load(folder, {name: Shard(tuple(entry.size), start, tensor)}, alone=True)
    return tensor


class _SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        known = self.metadata.state_dict_metadata if self.metadata else {}
        items: list[ReadItem] = []
        for name, shard in self.state_dict.items():
            entry = known.get(name)
            if not isinstance(entry, TensorStorageMetadata) or entry.size != shard.size():
                raise CheckpointError(f"the checkpoint has no tensor {name} of shape {tuple(shard.shape)}")
            items += create_read_items_for_chunk_list(name, entry, shard.__create_chunk_list__())
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].local


@contextmanager
def _quietly() -> Iterator[None]:
    """Without DCP's warning that a single process saves as one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _grouped(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    group: list[WriteItem] = []
    size = 0
    for item in items:
        more = item.tensor_storage_size() or 0
        if group and size + more > FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group
