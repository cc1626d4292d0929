"""Orthogonalisation of matrices that lie in pieces."""
