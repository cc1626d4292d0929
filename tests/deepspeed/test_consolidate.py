"""``lorapre consolidate`` on what several ranks saved; one process alone is in tests/unit/test_cli.py."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lorapre_dist.checkpoint import dcp
from lorapre_dist.cli import main
from lorapre_dist.state.shards import OPTIMIZER
from tests.distributed.harness import run_ranks

from .cases import FROZEN, SHAPES, Net
from .consolidate_cases import save_case


@pytest.mark.parametrize("world, stage, precision", [(2, 3, "bf16"), (2, 2, "fp32")])
def test_weights_and_state_that_ranks_saved_in_parts(world, stage, precision, tmp_path, capsys):
    ranks = run_ranks(world, save_case, stage=stage, precision=precision, folder=str(tmp_path / "run"))
    out = tmp_path / "out"
    assert main(["consolidate", str(tmp_path / "run"), str(out)]) == 0
    found = load_file(out / "model-00001-of-00001.safetensors")
    frozen = {f"{name}.weight" for name in FROZEN}
    assert found.keys() == {f"{name}.weight" for name in SHAPES} | frozen
    weights = ranks[0][0]
    for name, tensor in found.items():
        if name in frozen:
            assert torch.equal(tensor.float(), Net().get_parameter(name).detach())
        else:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, weights[name]), name

    state = load_file(out / "optimizer-00001-of-00001.safetensors")
    for _, rows in ranks:
        for name, (first, held) in rows.items():
            assert torch.equal(state[f"{name}.m_B"][first : first + len(held)], held), name
    tensors = tmp_path / "run" / "three" / "tensors"
    stored = {n: e for n, e in dcp.shapes(tensors).items() if n.startswith(OPTIMIZER)}
    assert {OPTIMIZER + name for name in state} == set(stored)
    for name, entry in stored.items():
        tensor = state[name.removeprefix(OPTIMIZER)]
        assert torch.equal(tensor.reshape(entry.size), dcp.whole(tensors, name, entry)), name
    # Some matrix was cut between ranks: rows of B and columns of A lie in several parts.
    assert any(len(e.chunks) > 1 for n, e in stored.items() if n.endswith("m_A"))
    assert json.loads((out / "optimizer.json").read_text())["aliases"] == {"head.weight": "embed.weight"}

    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run" / "three")]) == 0
    text = capsys.readouterr().out
    assert f"written by {world} ranks, layout ZeRO-{stage}" in text and "1 untrained" in text
