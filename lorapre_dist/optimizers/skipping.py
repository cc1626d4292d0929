"""Steps that were not taken because a gradient was not finite: how many, and when there are too many."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.guard import Skips


class NonFiniteError(RuntimeError):
    """Gradients were not finite in ``max_skipped`` steps in a row."""


class Skipping:
    """The part of an optimizer that counts them."""

    skips: Skips
    param_groups: list[dict[str, Any]]

    @classmethod
    def group_config(cls, group: dict[str, Any]) -> Any:
        """The settings of a parameter group."""
        raise NotImplementedError

    def _count(self, go: Tensor, looked: list[tuple[str, Tensor]]) -> None:
        """Count a step; warn and, after too many in a row, raise where one was skipped.

        Args:
            looked: names of the parameters here, and bounds on their gradients' elements.
        """
        before, _ = self.skips.seen
        self.skips.record(go)
        total, in_row = self.skips.look()
        if total > before:
            names = [name for name, largest in looked if not largest.isfinite()] if in_row >= self.max_skipped else []
            self._skipped(total, in_row, names)

    def _skipped(self, total: int, in_row: int, names: list[str]) -> None:
        if in_row < self.max_skipped:
            if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
                text = f"a gradient is not finite: step skipped ({in_row} in a row, {total} all together)"
                warnings.warn(text, stacklevel=5)
            return
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise NonFiniteError(
            f"gradients were not finite in {in_row} steps in a row, which were skipped; in the last one, on this rank: "
            f"{shown or 'none'}. Nothing was changed by them: lower the lr, warm up longer or look at the data"
        )

    def engine_stepped(self, skipped: bool, names: list[str], searching: bool) -> None:
        """DeepSpeed's engine has taken a step, or skipped it; it looks at gradients itself.

        Args:
            names: of parameters whose gradients are not finite on this rank, as far as is known.
            searching: steps are skipped to find a loss scale, which is not the gradients' fault.

        Raises:
            NonFiniteError: as :meth:`step`.
        """
        self.skips.record(torch.tensor(0.0 if skipped else 1.0, dtype=torch.float64))
        total, in_row = self.skips.look()
        if skipped and not searching:
            self._skipped(total, in_row, names)

    @property
    def max_skipped(self) -> int:
        """Steps in a row that may be skipped."""
        return min(self.group_config(group).max_skipped for group in self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped because a gradient was not finite; the host waits for it."""
        return int(self.skips.total)

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped; DeepSpeed's engine asks for it."""
        return bool(self.skips.in_row > 0)
