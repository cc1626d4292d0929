"""Memory figures of an optimizer on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.factors import Matrix
from ..layouts.base import Layout


@dataclass(frozen=True)
class MemoryReport:
    """Counts of parameters and bytes of optimizer state on this rank.

    Attributes:
        layout: name of the layout.
        world_size: ranks over which the state is spread.
        matrices, matrix_elements: low-rank parameters that this rank holds a part of, and its elements of them.
        adamw_parameters, adamw_elements: the same for the other parameters, under AdamW or ``other_state``.
        weights: how the stepped weights are kept: their types, and what becomes of the bits that 16 have no room for.
        weight_bytes: of them on this rank.
        state_bytes: of optimizer state on this rank.
        adamw_state_bytes: what AdamW (two numbers per element, same precision) would hold on this rank.
        workspace_bytes: bound on the tensors that a step allocates for itself; BLAS libraries add buffers of their own.
        overlap_bytes: bound on what ``overlap`` keeps from one step to the next; 0 without it.
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
    weights: str = ""
    weight_bytes: int = 0
    overlap_bytes: int = 0

    @classmethod
    def of(
        cls, held: list[tuple[Any, Any]], layout: Layout, workspace_bytes: int, overlap_bytes: int = 0
    ) -> MemoryReport:
        """The report for this rank's pieces and their state; the core knows the workspace."""
        matrices = [(piece, state) for piece, state in held if isinstance(state, Matrix) and state.low_rank]
        others = [(piece, state) for piece, state in held if not (isinstance(state, Matrix) and state.low_rank)]
        units = {piece.name: unit.tensor for unit in layout.units for piece in unit.pieces}
        return cls(
            layout=layout.name,
            world_size=layout.world_size,
            matrices=len(matrices),
            matrix_elements=sum(p.numel for p, _ in matrices),
            adamw_parameters=len(others),
            adamw_elements=sum(p.numel for p, _ in others),
            state_bytes=sum(t.numel() * t.element_size() for _, s in held for t in s.tensors().values()),
            adamw_state_bytes=sum(2 * p.numel * s.dtype.itemsize for p, s in held),
            workspace_bytes=workspace_bytes,
            weights=", ".join(sorted({_kept(state, units[piece.name]) for piece, state in held})),
            weight_bytes=sum(piece.numel * units[piece.name].element_size() for piece, _ in held),
            overlap_bytes=overlap_bytes,
        )

    def __str__(self) -> str:
        ratio = self.state_bytes / max(1, self.adamw_state_bytes)
        rows = [
            ("layout", f"{self.layout}, state over {self.world_size} rank{'s' if self.world_size > 1 else ''}"),
            ("low-rank matrices on this rank", f"{self.matrices:,} ({self.matrix_elements:,} elements)"),
            ("AdamW parameters on this rank", f"{self.adamw_parameters:,} ({self.adamw_elements:,} elements)"),
            ("optimizer state on this rank", f"{self.state_bytes / 2**20:.2f} MiB"),
            ("stepped weights on this rank", f"{self.weight_bytes / 2**20:.2f} MiB ({self.weights})"),
            ("AdamW would hold", f"{self.adamw_state_bytes / 2**20:.2f} MiB (ours is {ratio:.1%} of it)"),
            ("workspace of a step, at most", f"{self.workspace_bytes / 2**20:.2f} MiB"),
        ]
        if self.overlap_bytes:
            rows.append(("kept by overlap between steps", f"{self.overlap_bytes / 2**20:.2f} MiB, at most"))
        return "\n".join(f"{label:<32} {value}" for label, value in rows)


def _kept(state: Any, tensor: Any) -> str:
    kind, rounding = str(tensor.dtype).removeprefix("torch."), type(state.rounding).__name__.lower()
    return kind if rounding == "rounding" else f"{kind}, {rounding}"
