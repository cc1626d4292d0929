"""Checkpoints that outlive crashes, world sizes and layouts.

Under DeepSpeed ``engine.save_checkpoint`` and ``engine.load_checkpoint`` lead here; :func:`save` and :func:`load` are
for programs without it. :func:`verify` and :func:`newest_whole` look at what is on storage; see
:mod:`lorapre_dist.checkpoint.run` for its form.
"""

from .engine import wait
from .files import CheckpointError
from .native import load, save
from .run import newest_whole, verify

__all__ = ["CheckpointError", "load", "newest_whole", "save", "verify", "wait"]
