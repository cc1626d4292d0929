from __future__ import annotations

from hypothesis import settings

# The same examples in every run; no time limit, because the machine may be busy.
settings.register_profile("unit", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("unit")
