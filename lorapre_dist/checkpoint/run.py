"""Save an optimizer with the weights it steps, whole or not at all; :mod:`.loading` loads it into any layout.

A checkpoint's folder holds ``tensors/`` (torch.distributed.checkpoint), ``checkpoint.json`` (what they are),
``extra.pt`` (whatever else the caller gives; readable with ``weights_only=True``) and ``manifest.json``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..optimizers.base import LowRankOptimizer
from ..state.shards import (
    UNTRAINED,
    Shard,
    Untrained,
    state_shards,
    weight_shards,
)
from . import content, dcp, files, folder, stored
from .files import CheckpointError
from .folder import Manifest
from .team import Team

EXTRA = "extra.pt"


@dataclass
class Pending:
    """A checkpoint that is being written in the background."""

    directory: Path
    tag: str
    _published: Future[Path]
    _thread: ThreadPoolExecutor

    def wait(self) -> Path:
        """Its folder, once it is complete; a collective over the ranks that save.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            return self._published.result()
        finally:
            self._thread.shutdown()


@dataclass
class Job:
    """What to save.

    Attributes:
        step: of the run; orders checkpoints by age.
        untrained: tensors beside those of the optimizer, by name.
        aliases: name of a tied tensor to the name under which it is saved.
        extra: anything that ``torch.load(weights_only=True)`` reads; rank 0's counts.
        frozen: "saved", or "excluded" if frozen parameters were left out.
        also: called with the folder on every rank, to add files of its own; may issue collectives.
    """

    optimizer: LowRankOptimizer
    step: int
    untrained: dict[str, Untrained] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    frozen: str = "saved"
    also: Callable[[Path], None] | None = None


def save(
    job: Job,
    directory: str | Path,
    tag: str,
    *,
    group: Any = None,
    save_latest: bool = True,
    keep_last: int | None = None,
) -> Path:
    """Write checkpoint ``directory/tag``; a collective over ``group`` (default: all ranks).

    Args:
        keep_last: delete all but this many of the newest complete checkpoints afterwards.

    Raises:
        CheckpointError: on every rank, if a tensor is not finite, or it could not be written on one (a full disk, say);
            the earlier checkpoints, and what is in memory, are as they were.
    """
    team, shards = Team(group), _shards(job)
    path = _begin(job, shards, Path(directory), tag, keep_last, team)
    with _cleaned_up(path, team), team.together(f"saving checkpoint {path.parent / tag}"):
        dcp.save(path / content.TENSORS, shards, group)
    return seal(job.step, path, tag, team, save_latest, keep_last)


def save_in_background(
    job: Job,
    directory: str | Path,
    tag: str,
    *,
    group: Any,
    save_latest: bool = True,
    keep_last: int | None = None,
) -> Pending:
    """As :func:`save`, but return as soon as the tensors are copied to host memory.

    Args:
        group: a gloo group of all ranks that serves nothing else until ``wait`` returns; None in a single process.
    """
    team, shards = Team(group), _shards(job)
    path = _begin(job, shards, Path(directory), tag, keep_last, team)
    with _cleaned_up(path, team):
        written = dcp.save_in_background(path / content.TENSORS, shards, group)

    def finish() -> Path:
        with _cleaned_up(path, team), team.together(f"saving checkpoint {path.parent / tag}"):
            written.result()
        return seal(job.step, path, tag, team, save_latest, keep_last)

    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    return Pending(Path(directory), tag, thread.submit(finish), thread)


def _shards(job: Job) -> dict[str, Shard]:
    optimizer = job.optimizer
    held = [(bound.piece, bound.state) for bound in optimizer.bound()]
    assert optimizer.layout is not None
    return {**weight_shards(optimizer.layout.units), **state_shards(held), **keyed(job.untrained)}


def keyed(untrained: dict[str, Untrained]) -> dict[str, Shard]:
    """The shards of what is not trained, by their names in a checkpoint."""
    return {UNTRAINED + name: tensor.shard for name, tensor in untrained.items()}


def _begin(job: Job, shards: dict[str, Shard], directory: Path, tag: str, keep_last: int | None, team: Team) -> Path:
    if not tag or "/" in tag or tag.startswith("."):
        raise CheckpointError(f"tag {tag!r}: must be a plain folder name that does not begin with a dot")
    if keep_last is not None and keep_last < 1:
        raise CheckpointError(f"keep_last={keep_last}: must be at least 1")
    path = folder.partial(directory, tag)
    with team.together(f"saving checkpoint {directory / tag}"):
        refuse_non_finite(((name, shard.local) for name, shard in shards.items()))
    with team.together(f"saving checkpoint {directory / tag}"):
        if team.rank == 0:
            folder.start(directory, tag)
    held = team.gather(content.parameters(job.optimizer))
    untrained = _merged(team.gather({name: tuple(tensor.shape) for name, tensor in job.untrained.items()}))
    aliases = _merged(team.gather(job.aliases))
    with _cleaned_up(path, team), team.together(f"saving checkpoint {directory / tag}"):
        if not path.is_dir():
            raise CheckpointError(f"{directory} must be on storage that all ranks share")
        if team.rank == 0:
            described = content.describe(
                job.optimizer, held, untrained, step=job.step, aliases=aliases, frozen=job.frozen
            )
            described.write(path)
            (path / EXTRA).write_bytes(_readable(job.extra))
    if job.also is not None:
        with _cleaned_up(path, team), team.together(f"saving checkpoint {directory / tag}"):
            job.also(path)
    return path


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks have: stages of a pipeline have different tensors."""
    return {name: entry for part in parts for name, entry in part.items()}


def refuse_non_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise a CheckpointError if a tensor has elements that are not finite: nothing could be resumed from it."""
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} is not finite, and nothing could be resumed from it")


def _readable(extra: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(extra, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:  # pickle's own, with advice over many lines
        kind = str(error).split("Unsupported")[-1].strip().splitlines()[0]
        raise CheckpointError(
            "the client state holds something that weights_only=True cannot load; use tensors and plain values "
            f"({kind})"
        ) from error
    return buffer.getvalue()


def seal(step: int, path: Path, tag: str, team: Team, save_latest: bool, keep_last: int | None) -> Path:
    """Sync and checksum the files in the partial folder ``path`` and publish it as ``tag``; a collective.

    Raises:
        CheckpointError: on every rank, if one could not; what was written is removed.
    """
    directory = path.parent
    with _cleaned_up(path, team):
        described: dict[str, Any] = {}
        with team.together(f"saving checkpoint {directory / tag}"):
            strange = [f"{name} is {kind}, not a file" for name, kind in folder.entries(path).items() if kind]
            if strange:
                raise CheckpointError(strange[0])
            names = folder.files_in(path)
            described = {name: folder.describe(path / name) for name in names[team.rank :: team.size]}
        all_files = {name: entry for part in team.gather(described) for name, entry in part.items()}
        with team.together(f"saving checkpoint {directory / tag}"):
            if team.rank == 0:
                folder.publish(directory, Manifest(tag, step, dict(sorted(all_files.items()))), save_latest)
    if keep_last is not None:
        with team.together(f"deleting checkpoints older than {directory / tag}"):
            if team.rank == 0:
                folder.prune(directory, keep_last, tag)
    return directory / tag


class _cleaned_up:
    """If the block fails (on every rank alike), rank 0 removes what was written."""

    def __init__(self, path: Path, team: Team) -> None:
        self.path, self.team = path, team

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and self.team.rank == 0:
            folder.discard(self.path)


def verify(path: str | Path, *, group: Any = None) -> Manifest:
    """Read every file of a checkpoint through, each rank its part; a collective.

    Raises:
        CheckpointError: on every rank: each file that is missing, superfluous, truncated or changed.
    """
    team, path = Team(group), Path(path)
    manifest, problems = None, []
    try:
        share = slice(team.rank, None, team.size)
        manifest = Manifest.read(path)
        problems = folder.damage(path, manifest, share) or stored.not_finite(path, share)
    except CheckpointError as error:
        problems = [str(error)]
    except OSError as error:
        problems = [f"checkpoint {path} cannot be read ({error.strerror})"]
    found = sorted({problem for part in team.gather(problems) for problem in part})
    if found or manifest is None:
        if manifest is None or found[0].startswith("checkpoint "):
            raise CheckpointError(found[0])
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise CheckpointError(f"checkpoint {path} is damaged: " + "; ".join(found[:8]) + more)
    return manifest


def usable(path: str | Path, *, group: Any = None) -> Manifest:
    """As :func:`verify`, but the error names the newest checkpoint beside this one that can be used."""
    try:
        return verify(path, group=group)
    except CheckpointError as error:
        instead, _ = newest_whole(Path(path).parent, group=group)
        hint = f"the newest one that can be used is {instead.name!r}" if instead else "there is none that can be used"
        raise CheckpointError(f"{error}; {hint}") from error


def newest_whole(directory: str | Path, *, group: Any = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``directory`` that is whole, and what is wrong with each newer one; a collective."""
    team = Team(group)
    if team.rank == 0:
        folder.recover(Path(directory))
    found = None
    if team.rank == 0:
        problem = folder.latest_problem(Path(directory))
        pointed = None if problem else folder.latest(Path(directory))
        found = [str(p) for p in folder.candidates(Path(directory))], problem, pointed
    candidates, problem, pointed = team.gather(found)[0]
    complaints: list[str] = []
    for k, path in enumerate(candidates):
        try:
            verify(path, group=group)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        if problem is not None:
            complaints.append(problem)
        elif pointed in [Path(older).name for older in candidates[k + 1 :]]:
            complaints.append(f"{directory}/{folder.LATEST} names {pointed!r}, older than {Path(path).name!r}")
        return Path(path), complaints
    return None, complaints


def read_extra(path: Path) -> dict[str, Any]:
    """What was saved as ``extra``.

    Raises:
        CheckpointError: its file holds something else.
    """
    with files.opened(path / EXTRA) as file:
        extra = files.load_archive(file, os.fstat(file.fileno()).st_size, f"checkpoint {path}: {EXTRA}")
    if not isinstance(extra, dict):
        raise CheckpointError(f"checkpoint {path}: {EXTRA} holds no dict")
    return extra


def check_extra(path: Path, check: Callable[[dict[str, Any]], None] | None, extra: dict[str, Any]) -> None:
    """Let ``check`` see the client state in ``extra``, once it and the engine's state are of the form that is saved.

    Raises:
        CheckpointError: they are not.
    """
    state = extra.get("engine")
    if not isinstance(state, dict) or not isinstance(extra.get("client_state"), dict):
        raise CheckpointError(f"checkpoint {path}: {EXTRA} holds no state of an engine")
    counters = {key: value for key, value in state.items() if key not in ("lr_scheduler", "loss_scaler")}
    wrong = [key for key, value in counters.items() if not files.is_count(value)]
    wrong += [key for key in ("lr_scheduler", "loss_scaler") if not isinstance(state.get(key) or {}, dict)]
    if "global_steps" not in state or wrong:
        raise CheckpointError(f"checkpoint {path}: {EXTRA} holds no usable {(wrong or ['global_steps'])[0]!r:.80}")
    if check is not None:
        check(extra["client_state"])


def background_group() -> Any:
    """A gloo group of all ranks for :func:`save_in_background`; None in a single process. A collective."""
    return dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
