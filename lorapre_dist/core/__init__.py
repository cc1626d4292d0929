"""The algorithm on row intervals: geometry, factors, solves, collectives, the step. Knows tensors and groups only."""
