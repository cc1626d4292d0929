"""What a bench says of the bytes on the wire is what ranks send."""

from __future__ import annotations

import pytest

from lorapre_dist.bench.muon import bytes_rank, closed_form

from .harness import run_ranks


@pytest.mark.parametrize("shape", [(1024, 2752), (1000, 1998)])
def test_muon_sends_what_the_closed_form_says(shape):
    """Rows on four ranks; the second shape leaves ranks blocks of unequal size."""
    results = run_ranks(4, bytes_rank, shape=shape, rank=8)
    sent = {purpose: sum(result[purpose] for result in results) for purpose in results[0]}
    assert sent == closed_form(shape, 8, 4)
