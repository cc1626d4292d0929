"""Memory figures of an optimizer on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .core.adam import buckets, transient_bytes
from .core.factors import Matrix
from .core.refresh import CHUNK
from .core.workspace import Workspace
from .layouts.base import Layout


@dataclass(frozen=True)
class MemoryReport:
    """Counts of parameters and bytes of optimizer state on this rank.

    Attributes:
        layout: name of the layout.
        world_size: ranks over which the state is spread.
        matrices, matrix_elements: low-rank parameters that this rank holds a part of, and its elements of them.
        adamw_parameters, adamw_elements: the same for parameters under AdamW.
        state_bytes: of optimizer state on this rank.
        adamw_state_bytes: what AdamW (two numbers per element, same precision) would hold on this rank.
        workspace_bytes: bound on the tensors that a step allocates for itself; BLAS libraries add buffers of their own.
    """

    layout: str
    world_size: int
    matrices: int
    matrix_elements: int
    adamw_parameters: int
    adamw_elements: int
    state_bytes: int
    adamw_state_bytes: int
    workspace_bytes: int

    @classmethod
    def of(cls, held: list[tuple[Any, Any]], layout: Layout, workspace: Workspace) -> MemoryReport:
        """The report for this rank's pieces and their state."""
        matrices = [(piece, state) for piece, state in held if isinstance(state, Matrix)]
        others = [(piece, state) for piece, state in held if not isinstance(state, Matrix)]
        size = {id(piece): next(iter(state.tensors().values())).element_size() for piece, state in held}
        return cls(
            layout=layout.name,
            world_size=layout.world_size,
            matrices=len(matrices),
            matrix_elements=sum(p.numel for p, _ in matrices),
            adamw_parameters=len(others),
            adamw_elements=sum(p.numel for p, _ in others),
            state_bytes=sum(t.numel() * t.element_size() for _, s in held for t in s.tensors().values()),
            adamw_state_bytes=sum(2 * p.numel * size[id(p)] for p, _ in held),
            workspace_bytes=_workspace([s for _, s in matrices], workspace),
        )

    def __str__(self) -> str:
        ratio = self.state_bytes / max(1, self.adamw_state_bytes)
        rows = [
            ("layout", f"{self.layout}, state over {self.world_size} rank{'s' if self.world_size > 1 else ''}"),
            ("low-rank matrices on this rank", f"{self.matrices:,} ({self.matrix_elements:,} elements)"),
            ("AdamW parameters on this rank", f"{self.adamw_parameters:,} ({self.adamw_elements:,} elements)"),
            ("optimizer state on this rank", f"{self.state_bytes / 2**20:.2f} MiB"),
            ("AdamW would hold", f"{self.adamw_state_bytes / 2**20:.2f} MiB (ours is {ratio:.1%} of it)"),
            ("workspace of a step, at most", f"{self.workspace_bytes / 2**20:.2f} MiB"),
        ]
        return "\n".join(f"{label:<32} {value}" for label, value in rows)


def _workspace(matrices: list[Matrix], workspace: Workspace) -> int:
    """Largest bucket, and the buffers of one row block and of one batch of solves."""
    if not matrices:
        return 0
    size = matrices[0].m.B.element_size()
    squares = [m.m.B.shape[1] ** 2 + m.v.B.shape[1] ** 2 for m in matrices]
    runs = list(buckets(matrices, workspace.bucket))
    bucket = max(sum(map(transient_bytes, matrices[b])) for b in runs)
    # In fp64: the stacked Grams, their Cholesky factors, the inverses, and a copy that the solver makes.
    batch = max(sum(squares[b]) for b in runs)
    if matrices[0].m.B.device.type == "cpu":
        batch = min(batch, max(CHUNK, max(squares)))
    # Three temporaries of a row block, two more where the parameter is of another dtype.
    block = max(max(workspace.block, m.interval.shape[1] * size) for m in matrices)
    rows = max(min(m.interval.rows, max(1, workspace.block // (m.interval.shape[1] * size))) for m in matrices)
    ranks = max(m.m.B.shape[1] + m.v.B.shape[1] for m in matrices)
    # Old A times its inverse Gram, where the matrix has at least as many rows as columns.
    solved = max(m.interval.shape[1] if m.interval.rows >= m.interval.shape[1] else 0 for m in matrices)
    return bucket + 4 * batch * 8 + 5 * block + (3 * rows + solved) * ranks * size
