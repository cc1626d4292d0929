"""Saving and loading on one device: what cannot be written or does not fit ends in one clear error."""

from __future__ import annotations

import pytest
import torch

from lorapre_dist import LoRAPre, checkpoint
from lorapre_dist.checkpoint import CheckpointError


def trained(rank: int = 2) -> tuple[torch.nn.Module, LoRAPre]:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(9, 7), "norm": torch.nn.BatchNorm1d(5)})
    model["norm"].weight.requires_grad_(False)
    optimizer = LoRAPre([(n, p) for n, p in model.named_parameters() if p.requires_grad], rank=rank)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    return model, optimizer


def test_frozen_parameters_and_buffers_come_back(tmp_path):
    model, optimizer = trained()
    with torch.no_grad():
        model["norm"].weight.fill_(3)
        model["norm"].running_mean.fill_(4)
        model["norm"].num_batches_tracked.fill_(5)
    checkpoint.save(model, optimizer, tmp_path, "one", extra={"note": [1, "x"]})
    other, empty = trained()
    schedule = torch.optim.lr_scheduler.LambdaLR(empty, lambda step: 1.0)
    assert checkpoint.load(other, empty, tmp_path, lr_scheduler=schedule) == {"note": [1, "x"]}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_nothing_to_load_is_no_error(tmp_path):
    assert checkpoint.load(*trained(), tmp_path) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"saving checkpoint .*file/deeper/one failed: NotADirectoryError"):
        checkpoint.save(*trained(), tmp_path / "file" / "deeper", "one")


@pytest.mark.parametrize("tag", ["", "a/b", ".hidden"])
def test_tags_are_plain_names(tag, tmp_path):
    with pytest.raises(CheckpointError, match="must be a plain folder name"):
        checkpoint.save(*trained(), tmp_path, tag)


def test_extra_must_load_with_weights_only(tmp_path):
    with pytest.raises(CheckpointError, match="weights_only=True cannot load"):
        checkpoint.save(*trained(), tmp_path, "one", extra={"model": torch.nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []


def test_keep_last_must_keep_something(tmp_path):
    with pytest.raises(CheckpointError, match="keep_last=0"):
        checkpoint.save(*trained(), tmp_path, "one", keep_last=0)


def test_another_rank_is_refused_unless_asked_for(tmp_path):
    model, optimizer = trained(rank=2)
    checkpoint.save(model, optimizer, tmp_path, "one")
    other, wider = trained(rank=4)
    before = {n: t.clone() for n, t in wider.factors()["q_proj.weight"].items()}
    with pytest.raises(CheckpointError, match="rank was 2, is 4"):
        checkpoint.load(other, wider, tmp_path)
    assert all(torch.equal(t, wider.factors()["q_proj.weight"][n]) for n, t in before.items())
    checkpoint.load(other, wider, tmp_path, resize_rank=True)
    ours, theirs = (o.factors()["q_proj.weight"] for o in (wider, optimizer))
    assert torch.equal(ours["m_B"] @ ours["m_A"], theirs["m_B"] @ theirs["m_A"])
    assert (ours["m_A"][2:] != 0).all()  # new directions can be learned
