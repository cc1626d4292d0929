"""Measurements: ``python -m lorapre_dist.bench {quality,step,memory}``."""
