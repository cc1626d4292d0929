"""Makes the optimizers known to torch and DeepSpeed when those are imported: before or after this package, or never.

A command line can be checked in a tenth of a second while torch, DeepSpeed and transformers take ten, so importing
``lorapre_dist`` imports none of them. What it owes their users is done at their import: ``torch.optim.LoRAPre`` is
there as soon as ``torch.optim`` is, and ``DeepSpeedEngine`` binds our optimizers as soon as there is such a class.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ...config import CONFIGS
from . import op_builds, rank_buffers

Then = Callable[[Any], None]


class _Imports(importlib.abc.MetaPathFinder):
    """Leaves finding modules to the other finders, and adds to the execution of those that are waited for."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Then]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        waiting = self.waiting.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_then(module: ModuleType) -> None:
            execute(module)
            for then in waiting:
                then(module)

        spec.loader.exec_module = execute_and_then  # type: ignore[method-assign]
        return spec


_IMPORTS = _Imports()


def when_imported(name: str, then: Then) -> None:
    """Call ``then`` with the module ``name``: now if it is imported, else after it will have been."""
    if name in sys.modules:
        then(sys.modules[name])
        return
    _IMPORTS.waiting.setdefault(name, []).append(then)
    if _IMPORTS not in sys.meta_path:
        sys.meta_path.insert(0, _IMPORTS)


def register() -> None:
    """What ``import lorapre_dist`` does, once."""
    when_imported("torch.optim", _offer)
    when_imported("deepspeed.runtime.engine", _bind)
    when_imported("deepspeed.ops.op_builder.builder", op_builds.guard)
    when_imported("deepspeed.comm.torch", rank_buffers.unlink_when_open)


def _offer(optim: Any) -> None:
    """``torch.optim.LoRAPre`` and the others, where DeepSpeed looks for the ``type`` of a JSON."""

    def __getattr__(name: str) -> Any:
        if name not in CONFIGS:
            raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")
        from ...optimizers import OPTIMIZERS

        vars(optim).update(OPTIMIZERS)
        return OPTIMIZERS[name]

    optim.__getattr__ = __getattr__


def _bind(module: Any) -> None:
    """Let the first engine that takes a model import what binds ours; see :mod:`.bind`."""
    engine = module.DeepSpeedEngine
    configure = engine._configure_distributed_model

    def import_and_configure(self: Any, *args: Any, **kwargs: Any) -> Any:
        if engine._configure_distributed_model is not import_and_configure:  # registered, and called by what binds
            return configure(self, *args, **kwargs)
        engine._configure_distributed_model = configure
        from . import bind

        bind.register()
        return engine._configure_distributed_model(self, *args, **kwargs)

    engine._configure_distributed_model = import_and_configure
