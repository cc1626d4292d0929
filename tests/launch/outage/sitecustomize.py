"""On ``PYTHONPATH``, this makes ``flaky://`` known in every process of a run."""

from tests.training.flaky import register

register()
