"""Checkpoints that outlive crashes, world sizes and layouts.

Under DeepSpeed ``engine.save_checkpoint`` and ``engine.load_checkpoint`` lead here; :func:`save` and :func:`load` are
for programs without it. :func:`verify` and :func:`newest_whole` look at what is on storage; see
:mod:`lorapre_dist.checkpoint.run` for its form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import lazily
from .files import CheckpointError

if TYPE_CHECKING:
    from ..integrations.deepspeed.checkpoint import wait
    from .native import load, save
    from .run import newest_whole, verify

__all__ = ["CheckpointError", "load", "newest_whole", "save", "verify", "wait"]

__getattr__, __dir__ = lazily.attributes(
    __name__,
    {
        **{"load": "native", "save": "native", "newest_whole": "run", "verify": "run"},
        **{name: name for name in ("consolidate", "inspect", "native", "run", "stored")},
        "wait": ".integrations.deepspeed.checkpoint",
    },
)
