"""How many bytes of tensors are alive, at each moment of a training step.

What every operation gives is looked at, those of autograd and of collectives included, and its storage counted from
then on until it is freed or resized; what was there before has to be shown. What a kernel allocates within itself is
not seen. It works on any device, ``meta`` included, whose tensors take no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class Live(TorchDispatchMode):
    """While entered, counts the bytes of live storages on one kind of device.

    Attributes:
        device: its type.
        now: bytes alive.
        peaks: the most of it during each :meth:`moment`, by name.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._moment = ""
        self._known: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor):
                self.see(one)
        return found

    def __enter__(self) -> Live:
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            self._look(storage)
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """What is allocated meanwhile counts to this moment's peak."""
        before, self._moment = self._moment, name
        self.peaks[name] = max(self.peaks.get(name, 0), self.now)
        try:
            yield
        finally:
            self._moment = before

    def see(self, tensor: Tensor) -> None:
        """Count a tensor that is there already."""
        if not is_traceable_wrapper_subclass(tensor) and tensor.device.type == self.device:
            self._look(tensor.untyped_storage())

    def _look(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is None:
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), size
            self.now += size
        elif known[1] != size:
            self._known[key] = known[0], size
            self.now += size - known[1]
        else:
            return
        self.peaks[self._moment] = max(self.peaks.get(self._moment, 0), self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)[1]
