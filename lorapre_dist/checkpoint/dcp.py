"""Tensors to and from storage with ``torch.distributed.checkpoint``: bounded memory, and no code in the metadata."""

from __future__ import annotations

import pickle
import queue
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from ..shards import Shard
from .folder import CheckpointError

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

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors."""
        files: queue.Queue[Any] = queue.Queue()
        for k, items in enumerate(_grouped(plan.items)):
            name = f"{plan.storage_data.prefix}{k}.distcp"
            files.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, files)


class Reader(dcp.FileSystemReader):
    """Reads the metadata without running what a pickle may ask for."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata of the checkpoint.

        Raises:
            CheckpointError: it holds anything but DCP's own records.
        """
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError, KeyError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def _member(enum: Any, name: Any) -> Enum:
    """A member of an enum, in place of the ``getattr`` by which Python up to 3.11.3 asks for it."""
    if not (isinstance(enum, type) and issubclass(enum, Enum) and name in list(enum.__members__)):
        raise pickle.UnpicklingError(f"getattr({enum!r}, {name!r}) has no place in a checkpoint")
    return enum[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
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
