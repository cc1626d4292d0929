"""The algorithm on row intervals: geometry, factors, solves, collectives and the step. Knows tensors and groups only."""
