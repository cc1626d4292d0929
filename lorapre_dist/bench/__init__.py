"""Measurements: ``python -m lorapre_dist.bench {quality,step,equality,memory}``."""
