"""``lorapre consolidate`` on what several ranks saved; one process alone is in tests/unit/test_cli.py."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import lorapre_dist
from lorapre_dist.checkpoint import dcp
from lorapre_dist.cli import main
from lorapre_dist.state.shards import OPTIMIZER
from tests.distributed.harness import run_ranks

from .cases import FROZEN, SHAPES, Net, full_parameters
from .checkpoint_cases import engine_of, train_alike


def save_case(
    rank: int, world_size: int, *, stage: int, precision: str, folder: str
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, torch.Tensor]]]:
    """Train a little and save: the fp32 weights, and rows of every ``m_B`` on this rank with the first row's number."""
    engine = engine_of(stage, precision)
    train_alike(engine, range(3))
    engine.save_checkpoint(folder, tag="three", client_state={"note": 1})
    weights = full_parameters(engine)
    rows = {}
    for bound in lorapre_dist.deepspeed.base_optimizer(engine).bound():
        if "m_B" in bound.state.tensors():
            rows[bound.piece.name] = (bound.state.interval.first_row, bound.state.tensors()["m_B"].clone())
    engine.destroy()
    dist.barrier()
    return weights, rows


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
