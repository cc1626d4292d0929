"""Relatives of LoRA-Pre that no package offers: optimizers that factor their momentum, in short dense forms.

Each file has one: the state and the step of a matrix, written from its paper's equations, with what was assumed where
the paper leaves something open. They are to be compared with, not to be trained with: nothing is sharded, and products
are formed whole.

Not here, because their rules could not be established: Alada (arXiv 2512.13034: how its first moment is kept and its
factors begin) and AdaMeM (ICML 2024 workshop: how its momentum moves to another subspace).
"""
