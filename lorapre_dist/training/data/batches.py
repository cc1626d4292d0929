"""Which rank takes which sequences of a global batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """Step ``t`` uses sequences ``[t G, (t + 1) G)`` of the corpus, whatever the number of ranks.

    Attributes:
        global_batch: ``G``, sequences per optimizer step.
        micro_batch: sequences per forward pass and rank.
        world_size: ranks.
        rank: this rank; it takes the ``rank``-th of ``world_size`` equal runs of every global batch.
    """

    global_batch: int
    micro_batch: int
    world_size: int
    rank: int

    @property
    def per_rank(self) -> int:
        """Sequences per optimizer step on one rank."""
        return self.global_batch // self.world_size

    @property
    def first(self) -> int:
        """Position in the global batch of this rank's first sequence."""
        return self.rank * self.per_rank

    def share(self, total: int) -> range:
        """This rank's run of ``total`` items, the runs' lengths differing by one at most."""
        return range(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)
