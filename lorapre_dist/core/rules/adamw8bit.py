"""AdamW of a matrix without factors, with both moments in 8 bits (``codes.py``). Its rule in a step (``step.py``).

A row's scale is the largest of its elements, as they are after the step. Rows that are cut between ranks are stepped
twice, the first time for that number alone, and ranks find the largest of theirs together: codes, scales and weights
are those of one device, wherever a parameter is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import codes, noise, regression
from ..comm import Comm
from ..exchange import Work
from ..regression import Block, Regression
from ..spec import SCALES
from ..workspace import Workspace
from . import adamw
from .needs import ADAMW8BIT

#: Temporaries are of this share of a row block's: there are ten where other rules have four.
PARTS = 4


@dataclass(frozen=True)
class AdamW8bit:
    """Settings of one parameter group at one step."""

    hyper: adamw.Hyper
    regression: Regression = field(default_factory=lambda: Regression((0.0,), 1.0, stable=True))
    boundary_sums = ADAMW8BIT.boundary_sums
    boundary_largest = True
    per_element = 0

    @property
    def decay(self) -> Any:
        """What weights lose in a step."""
        return self.hyper.lr * self.hyper.weight_decay

    def sum_boundary(self, work: Work, workspace: Workspace) -> None:
        """The largest ``|exp_avg|`` and ``exp_avg_sq`` of this rank's part of each cut row."""
        pace = self._pace(work)
        for block in regression.blocks(work, workspace, cut_only=True):
            for part in _parts(block, workspace):
                for k, wide in enumerate(_moments(work, part, pace)):
                    work.edge[:, part.lines, k] = wide.abs_().amax(-1)

    def begin(self, work: Work, workspace: Workspace) -> None:
        """The pace of the step, and the words of its random bits."""
        matrix = work.matrix
        assert matrix.salt is not None
        work.context = self._pace(work), noise.draw(matrix.salt, matrix.taken, noise.CODES)

    def update_block(self, work: Work, block: Block, workspace: Workspace) -> None:
        """One block: its moments, the update of theta, then the codes."""
        pace, words = work.context
        for part in _parts(block, workspace):
            moments = _moments(work, part, pace)
            rounding, dtype = work.matrix.rounding, work.matrix.dtype
            wide = rounding.wide(part.theta, part.at, dtype)
            adamw.update(wide, *moments, pace)
            rounding.put(wide, part.theta, part.at)
            del wide
            _keep(work, part, moments, words)

    def finish(self, works: list[Work], comm: Comm, workspace: Workspace) -> None:
        """Nothing is left to do."""

    def _pace(self, work: Work) -> adamw.Pace:
        return adamw.pace(self.hyper, work.matrix.taken, work.item.go, work.matrix.dtype, dims=2)


def _parts(block: Block, workspace: Workspace) -> Iterator[Block]:
    """A block in parts of fewer rows."""
    k, rows, width = block.theta.shape
    size = max(1, workspace.block_on(block.theta.device.type) // (PARTS * 4 * k * max(1, width)))
    for low in range(0, rows, size):
        high = min(rows, low + size)
        first = block.rows.start
        yield replace(
            block,
            theta=block.theta[:, low:high],
            grad=block.grad[:, low:high],
            rows=slice(first + low, first + high),
            lines=block.lines and slice(block.lines.start + low, block.lines.start + high),
            at=block.at + low * width,
        )


def _moments(work: Work, block: Block, pace: adamw.Pace) -> tuple[Tensor, Tensor]:
    """``exp_avg`` and ``exp_avg_sq`` of a block's elements, after the step."""
    matrix = work.matrix
    m, v = (
        codes.decoded(_held(matrix.codes[key], block), matrix.vectors[scale][:, block.rows, None])
        for scale, key in SCALES.items()
    )
    adamw.average(block.grad.to(matrix.dtype), m, v, pace)
    return m, v


def _keep(work: Work, block: Block, moments: tuple[Tensor, Tensor], words: Tensor) -> None:
    """Round the moments into codes, by the scales that their rows have now; nothing changes where no step is taken."""
    matrix, go = work.matrix, work.item.go
    first, q = matrix.interval.first_row, matrix.interval.shape[1]
    rows = first + block.rows.start, first + block.rows.stop
    index = noise.places(rows, (block.columns.start, block.columns.stop), q, words.device)
    random = noise.halves(noise.bits(index.view(-1), words))

    def put(kept: Tensor, fresh: Tensor) -> None:
        kept.copy_(fresh if go.sure else torch.where(go.value > 0, fresh, kept))

    for k, (scale, key) in enumerate(SCALES.items()):
        wide, of_rows, kept = moments[k], matrix.vectors[scale][:, block.rows], _held(matrix.codes[key], block)
        largest = wide.abs().amax(-1) if block.lines is None else work.edge[:, block.lines, k]
        put(kept, codes.encoded(wide, largest[..., None], kept.dtype, random[k].view(wide.shape)))
        put(of_rows, largest)


def _held(of_elements: Tensor, block: Block) -> Tensor:
    """A block's part of the codes of a stack of pieces (k x n): k x rows x columns."""
    shape: Any = block.theta.shape
    return of_elements[:, block.at : block.at + shape[1] * shape[2]].view(shape)
