"""A checkpoint as one folder that other programs read: weights and optimizer state in safetensors, by parameter name.

One process, no ``torch.distributed``; no more than one part of one tensor is in memory at a time. The folder:

    model-00001-of-0000N.safetensors, model.safetensors.index.json, config.json, the tokenizer's files
        what ``AutoModelForCausalLM.from_pretrained`` loads; tied tensors under one of their names
    optimizer-00001-of-0000N.safetensors, optimizer.safetensors.index.json
        ``NAME.m_B`` (p x r), ``NAME.m_A`` (r x q), ``NAME.v_B``, ``NAME.v_A``, ``NAME.rms_row`` (p), or
        ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` in the parameter's shape
    optimizer.json
        {"format": 1, "step": n, "layout": "ZeRO-2", "world_size": 4, "aliases": {...}, "param_groups": [...],
         "parameters": {NAME: an entry for each trained one, see ``entries.py``}}
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError
from ..config.param_groups import parameter_name
from ..layouts.matrices import expert_name
from ..state.shards import MODEL, OPTIMIZER, UNTRAINED
from . import content, folder, run, stored
from .content import Content
from .files import CheckpointError
from .safetensors_files import Entry, write

#: Sub-folder of a checkpoint with config.json and the tokenizer's files.
HF = "hf"
DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
FORMAT = 1
# Files of a model folder that hold weights: not to be copied with its configuration.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass
class Result:
    """What :func:`consolidate` wrote.

    Attributes:
        bytes: of weights and of optimizer state.
        notes: what the user should know, a line each.
    """

    source: Path
    out: Path
    weights: int = 0
    optimizer_tensors: int = 0
    bytes: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)


def consolidate(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str = "keep",
    optimizer: bool = True,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Result:
    """Write a checkpoint as one folder of safetensors files; the folder appears when it is complete.

    Args:
        source: the checkpoint, or a run's folder, which means its latest one.
        dtype: of floating-point weights: "fp32", "bf16", "fp16", or "keep" for what was saved (fp32 masters).
        optimizer: False leaves the optimizer state out.
        config: ``config.json`` or a model folder, where the checkpoint holds none or another is wanted.
        overwrite: replace what an earlier call wrote to ``out``.

    Raises:
        CheckpointError: the checkpoint is damaged, or ``out`` is not empty.
        ConfigError: an unknown ``dtype``, or ``config`` is not usable.
        OSError: ``out`` cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    path, target = stored.locate(Path(source)), Path(out).resolve()
    _check_target(target, path.resolve(), overwrite)
    config_files = _config_files(path, config)
    run.verify(path)
    described = content.read(path)
    tensors, shapes = stored.complete(path, described)

    result = Result(path, Path(out))
    # Not named as a partial checkpoint: the next save in the same folder would remove it.
    partial = target.with_name(f".{target.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, file in config_files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / name)
        entries = list(_weights(shapes, tensors, DTYPES[dtype]))
        entries += _untied(partial, described.aliases, entries)
        write(partial, "model", entries)
        result.weights, result.bytes = len(entries), (sum(e.bytes for e in entries), 0)
        _note(result, described, partial, entries)
        if optimizer:
            states = list(_states(shapes, tensors))
            write(partial, "optimizer", states)
            folder.write_json(partial / "optimizer.json", _summary(described))
            result.optimizer_tensors, result.bytes = len(states), (result.bytes[0], sum(e.bytes for e in states))
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _check_target(target: Path, path: Path, overwrite: bool) -> None:
    if target == path or target in path.parents or path in target.parents:
        raise CheckpointError(f"{target}: the result cannot lie in the checkpoint {path}, nor the other way round")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} is not empty; name another folder, or replace it with --overwrite")
    if not folder.consolidated(target):
        # Replacing means deleting: not what a slip of the finger names.
        raise CheckpointError(f"{target} holds something else than an earlier result: delete it yourself")


def _config_files(path: Path, config: str | Path | None) -> dict[str, Path]:
    """config.json and what belongs to it: name in the result, and where to copy it from."""
    if config is None:
        beside = [n for n in folder.files_in(path) if n.startswith(f"{HF}/") and not n.endswith(_WEIGHTS)]
        return {name.removeprefix(f"{HF}/"): path / name for name in beside}
    given = Path(config)
    file = given / CONFIG if given.is_dir() else given
    try:
        if "model_type" not in json.loads(file.read_text(encoding="utf-8")):
            raise ValueError("it has no 'model_type'")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"config {config}: not a usable {CONFIG} ({error})") from error
    if not given.is_dir():
        return {CONFIG: file}
    return {p.name: p for p in sorted(given.iterdir()) if p.is_file() and not p.name.endswith(_WEIGHTS)}


def _weights(
    shapes: dict[str, tuple[int, ...]], tensors: dict[str, stored.StoredTensor], dtype: torch.dtype | None
) -> Iterator[Entry]:
    stacks: dict[str, dict[str, stored.StoredTensor]] = {}
    for name, shape in shapes.items():
        if not name.startswith(OPTIMIZER):
            # What no rank wrote has no elements.
            source = tensors.get(name) or stored.StoredTensor((0,), torch.float32, ())
            to = dtype if dtype is not None and source.dtype.is_floating_point else source.dtype
            name = name.removeprefix(MODEL if name.startswith(MODEL) else UNTRAINED)
            if (whole := parameter_name(name)) == name:
                yield Entry(name, shape, to, source)
                continue
            experts = stacks.setdefault(whole, {})
            experts[name] = source
            if f"{MODEL}{expert_name(whole, len(experts))}" not in shapes:  # it was the last one
                names = [expert_name(whole, e) for e in range(len(experts))]
                if set(names) != experts.keys() or any(shapes[MODEL + n] != shape for n in names):
                    raise CheckpointError(
                        f"the experts of {whole} do not form a stack: {', '.join(sorted(experts)[:8])}"
                    )
                source = stored.joined([experts[name] for name in names])
                yield Entry(whole, (len(experts), *shape), to, source)


def _untied(partial: Path, aliases: Mapping[str, str], entries: list[Entry]) -> list[Entry]:
    """Tied tensors under their other names too, where config.json says that the model does not tie them itself."""
    config = _json(partial / CONFIG)
    if config.get("tie_word_embeddings") is not False:
        return []
    found = {entry.name: entry for entry in entries}
    copies = [(alias, found[name]) for alias, name in aliases.items() if name in found]
    return [Entry(alias, entry.shape, entry.dtype, entry.source) for alias, entry in copies]


def _states(shapes: dict[str, tuple[int, ...]], tensors: dict[str, stored.StoredTensor]) -> Iterator[Entry]:
    for name, shape in shapes.items():
        if name.startswith(OPTIMIZER) and name in tensors:
            yield Entry(name.removeprefix(OPTIMIZER), shape, tensors[name].dtype, tensors[name])


def _summary(described: Content) -> dict[str, Any]:
    content = described.to_json()
    kept = {key: content[key] for key in ("step", "layout", "world_size", "aliases", "param_groups")}
    trained = {name: entry.to_json() for name, entry in described.trained.items()}
    return {"format": FORMAT, **kept, "parameters": trained}


def _note(result: Result, described: Content, partial: Path, entries: list[Entry]) -> None:
    """Say in ``config.json`` what type the weights have, and in the result's notes what is missing."""
    if (partial / CONFIG).is_file():
        sizes: Counter[torch.dtype] = Counter()
        for entry in entries:
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] += entry.bytes
        config = _json(partial / CONFIG)
        for key in ("dtype", "torch_dtype") if "torch_dtype" in config else ("dtype",):
            config[key] = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        result.notes.append(
            f"no {CONFIG}: the checkpoint holds none; give one with --config, or copy it to {result.out} "
            "before from_pretrained"
        )
    if described.frozen == "excluded":
        result.notes.append("frozen parameters were left out when the checkpoint was saved, and are not there")


def _json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file.name} cannot be read ({error})") from error
    return found


def _publish(partial: Path, target: Path) -> None:
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
