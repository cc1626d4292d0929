"""Let DeepSpeed read a configuration, and refuse what it would ignore.

DeepSpeed passes over a key that it does not know at the top and in its older sections. Which keys it knows is in no
list; so it is given a dict that notes what it was asked for, with the default beside it, which also says the type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.utils import logger
from pydantic import ValidationError

from ...config.checks import ConfigError
from ...config.ds_json import BATCH_SIZES

#: Read elsewhere than in DeepSpeed's configuration: by ``deepspeed.initialize``, Transformers and Accelerate.
_READ_ELSEWHERE = ("data_parallel_size", "sequence_parallel_size", "inference", "msamp")
#: What an optimizer or scheduler is given as it stands, and what is read only where another key switches it on.
_OPEN = ("optimizer.params", "scheduler.params", "data_efficiency", "autotuning")
#: A key that begins so is a comment.
_COMMENT = ("_", "#", "//")


class _Watched(dict[str, Any]):
    """A dict that notes in ``asked`` the keys it was asked for, with their defaults.

    Attributes:
        whole: it was copied or gone through instead, and its keys are somebody else's to check.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Watched(v) if isinstance(v, Mapping) else v for k, v in values.items()})
        self.asked: dict[str, Any] = {}
        self.whole = False

    def _note(self, key: str, default: Any = None) -> None:
        if self.asked.get(key) is None:
            self.asked[key] = default

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.whole = True
        return super().__iter__()

    def keys(self) -> Any:  # ``KEY in d.keys()`` is DeepSpeed's habit
        return self

    def items(self) -> Any:
        self.whole = True
        return super().items()

    def __copy__(self) -> _Watched:
        copied = _Watched({})
        dict.update(copied, super().items())
        copied.asked, self.whole = self.asked, True
        return copied

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return dict(super().items())


def check(config: Mapping[str, Any]) -> None:
    """Raise a ConfigError unless DeepSpeed reads all of ``config``, and takes every value of it.

    Batch sizes are left out: they depend on the number of ranks.
    """
    watched = _Watched({**config, **dict.fromkeys(BATCH_SIZES), "train_micro_batch_size_per_gpu": 1})
    silent, logger.disabled = logger.disabled, True  # it warns again when the engine is built
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        raise ConfigError(_explain(error, config)) from error
    except Exception as error:  # assertions, and what it stumbles over
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"DeepSpeed refuses it: {'; '.join(lines[:3]) or type(error).__name__}") from error
    finally:
        logger.disabled = silent
    _check_section(watched, "")


def _check_section(section: _Watched, prefix: str) -> None:
    known = [*section.asked, *(_READ_ELSEWHERE if not prefix else ())]
    for key, value in dict.items(section):
        path = f"{prefix}{key}"
        if key not in known:
            if not str(key).startswith(_COMMENT):
                raise ConfigError(_unknown(path, str(key), known))
        elif isinstance(value, _Watched):
            if value.asked and not value.whole and path not in _OPEN:
                _check_section(value, f"{path}.")
        else:
            _check_type(path, value, section.asked.get(key))


def _check_type(path: str, value: Any, default: Any) -> None:
    """A value in place of a default of its own type; a switch may be a section as well."""
    if isinstance(default, bool):
        ok = isinstance(value, bool) or not isinstance(value, (str, int, float))
        what = "true or false"
    elif isinstance(default, (int, float)):
        ok, what = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    else:
        ok, what = value is None or not isinstance(default, str) or isinstance(value, str), "a string"
    if not ok:
        raise ConfigError(f"{path}={value!r}: must be {what}")


def _unknown(path: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    parent = path.removesuffix(key)
    if near:
        return f"unknown key {path!r}: did you mean {parent + near[0]!r}?"
    if parent == "optimizer.":
        return f"unknown key {path!r}: the optimizer's options belong into optimizer.params"
    return f"unknown key {path!r}: DeepSpeed does not read it; remove it (a comment's key begins with '_')"


def _explain(error: ValidationError, config: Mapping[str, Any]) -> str:
    """DeepSpeed's models refuse what they do not know, but name neither the section nor what is near."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    path = ".".join(_path_to(config, names) or [error.title, *names])
    if first["type"] == "extra_forbidden":
        # Which model a nested value belongs to is not said.
        models = [m for m in _models(DeepSpeedConfigModel) if len(names) > 1 or m.__name__ == error.title]
        fields = [n for m in models for key, field in m.model_fields.items() for n in (key, field.alias) if n]
        return _unknown(path, names[-1], fields)
    return f"{path}={first['input']!r}: {' '.join(first['msg'].split())}"


def _models(model: Any) -> Iterator[Any]:
    yield model
    for child in model.__subclasses__():
        yield from _models(child)


def _path_to(section: Any, names: list[str]) -> list[str] | None:
    """Keys to the first value, at any depth, that lies under ``names``."""
    if not isinstance(section, Mapping):
        return None
    inner: Any = section
    for name in names:
        inner = inner[name] if isinstance(inner, Mapping) and name in inner else None
        if inner is None:
            break
    else:
        return names if names else None
    for key, value in section.items():
        found = _path_to(value, names)
        if found:
            return [str(key), *found]
    return None
