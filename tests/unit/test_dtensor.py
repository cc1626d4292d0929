"""How a DTensor becomes a piece, from the boxes that ranks hold."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist.config import ConfigError
from lorapre_dist.layouts import dtensor
from lorapre_dist.layouts.base import Spread


def test_experts_on_more_ranks_than_there_are_may_not_be_split_inside():
    """Ranks without any could not take part in bringing the others' columns into rows."""
    p = torch.empty(1, 4, 6)
    split = [((0, 1), (0, 4), (0, 3)), ((0, 1), (0, 4), (3, 6)), ((1, 1), (0, 4), (0, 3)), ((1, 1), (0, 4), (3, 6))]
    with pytest.raises(ConfigError, match=r"^mlp.experts: its 1 matrices lie on more ranks than that.*at most 1 ranks"):
        dtensor.piece("mlp.experts", p, Spread((0, 1, 2, 3), tuple(split), 0))
    assert dtensor.piece("mlp.experts", p, Spread((0, 1), tuple(split[:2]), 1)).spread is not None
