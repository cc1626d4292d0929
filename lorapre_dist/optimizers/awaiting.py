"""Whether an optimizer that is made now is told by DeepSpeed's engine where its parameters lie."""

from __future__ import annotations

from typing import Any

_engine_is_building = False


class building_under_engine:
    """While entered, new optimizers wait for the engine to bind their layout."""

    def __enter__(self) -> None:
        global _engine_is_building
        _engine_is_building = True

    def __exit__(self, *_: Any) -> None:
        global _engine_is_building
        _engine_is_building = False


def engine_is_building() -> bool:
    """Whether an engine is being built: it binds the layouts of the optimizers made meanwhile."""
    return _engine_is_building
