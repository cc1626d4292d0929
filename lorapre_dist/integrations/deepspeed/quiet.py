"""DeepSpeed's remarks at the start, left out of the programs of this project; ``LORAPRE_VERBOSE=1`` has them back."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from typing import Any

from . import register

VERBOSE = "LORAPRE_VERBOSE"


def wanted() -> bool:
    """Whether nobody asked for the remarks."""
    return os.environ.get(VERBOSE, "0") in ("", "0")


@functools.cache
def deepspeed() -> None:
    """From now on, this process says neither that there is no GPU nor, four times, that an op is built."""
    if wanted():
        logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to" not in record.getMessage())
        register.when_imported("deepspeed.comm.torch", _build_silently)


def _build_silently(comm: Any) -> None:
    build = comm.build_shm_op

    @functools.wraps(build)
    def silently() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return build()

    comm.build_shm_op = silently
