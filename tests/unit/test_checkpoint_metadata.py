"""What a checkpoint's metadata may hold: DCP's own records, as every supported Python pickles them."""

from __future__ import annotations

import os
import pickle

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from lorapre_dist.checkpoint import CheckpointError
from lorapre_dist.checkpoint.dcp import Reader


class Asks:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def written(folder, content):
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, {"format": content}, {})))
    return Reader(str(folder))


def test_enums_as_python_up_to_3_11_3_pickles_them(tmp_path):
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for content in (member, Asks(getattr, _MEM_FORMAT_ENCODING, member.name)):
        assert written(tmp_path, content).read_metadata().planner_data == {"format": member}


@pytest.mark.parametrize(
    "call",
    [
        (getattr, _MEM_FORMAT_ENCODING, "mro"),
        (getattr, _MEM_FORMAT_ENCODING, "__init__"),
        (getattr, Metadata, "__init__"),
        (getattr, "text", "format"),
        (getattr, _MEM_FORMAT_ENCODING, ["TORCH_CONTIGUOUS_FORMAT"]),
        (os.system, "true"),
        (eval, "1"),
    ],
)
def test_nothing_else_is_called(call, tmp_path):
    with pytest.raises(CheckpointError, match="has no place in a checkpoint"):
        written(tmp_path, Asks(*call)).read_metadata()
