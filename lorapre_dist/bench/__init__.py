"""Measurements: ``python -m lorapre_dist.bench`` lists them."""
