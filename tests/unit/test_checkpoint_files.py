"""Files that were made to do harm: nothing is run, nothing is followed, nothing grows, nothing hangs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from lorapre_dist.checkpoint import CheckpointError, files, folder, newest_whole
from lorapre_dist.checkpoint.folder import Manifest
from lorapre_dist.cli import main as lorapre

from .test_checkpoint_mutations import NEW, OLD, Run, loads, reseal, run, saved  # noqa: F401


@pytest.fixture
def path(saved, tmp_path) -> Path:  # noqa: F811
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def compressed(file: Path, zeros: int) -> None:
    """What ``torch.save`` writes of so many zeros, compressed."""
    buffer = io.BytesIO()
    torch.save({"engine": torch.zeros(zeros, dtype=torch.uint8), "client_state": {}}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))


def test_what_would_grow_is_not_read(run, saved, path, capsys):  # noqa: F811
    compressed(path / NEW / "extra.pt", 50_000_000)
    reseal(path / NEW)
    assert (path / NEW / "extra.pt").stat().st_size < 100_000
    said = loads(run, path, NEW, saved[1])
    assert said is not None and "extra.pt cannot be read (it would take more than its" in said
    assert lorapre(["inspect", str(path / NEW)]) == 2
    assert "it would take more than its" in capsys.readouterr().err


def test_a_part_is_as_large_as_declared(run, saved, path):  # noqa: F811
    """DCP itself cuts out what it needs from a larger one, wherever that lies."""
    metadata = pickle.loads((path / NEW / "tensors" / ".metadata").read_bytes())
    name = "optimizer.q_proj.weight.m_A"
    index = next(i for i in metadata.storage_data if i.fqn == name)
    torch.save(torch.full((4, 9), 7.0), path / NEW / "tensors" / "__9_0.distcp")
    at = metadata.storage_data[index]
    at.relative_path, at.offset = "__9_0.distcp", 0
    at.length = (path / NEW / "tensors" / "__9_0.distcp").stat().st_size
    (path / NEW / "tensors" / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path / NEW)
    said = loads(run, path, NEW, saved[1])
    assert said is not None and "expected a tensor of (2, 9), torch.float32, found (4, 9), torch.float32" in said


def test_a_rank_is_not_resized_to_what_metadata_makes_up(run, path):  # noqa: F811
    from lorapre_dist import LoRAPre, checkpoint

    described = json.loads((path / NEW / "checkpoint.json").read_text())
    described["parameters"]["q_proj.weight"]["rank"] = 10**12
    (path / NEW / "checkpoint.json").write_text(json.dumps(described))
    metadata = pickle.loads((path / NEW / "tensors" / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["optimizer.q_proj.weight.m_B"]
    entry.size, entry.chunks = torch.Size([7, 10**12]), []
    (path / NEW / "tensors" / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(path / NEW)
    run.clear()
    model = run.model
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("q_proj")]
    wider = LoRAPre([{"params": [named[0]]}, {"params": named[1:]}], rank=3)
    with pytest.raises(CheckpointError, match=r"optimizer.q_proj.weight.m_B has 0 of its 7000000000000 elements"):
        checkpoint.load(model, wider, path, NEW, resize_rank=True)


def test_links_out_of_a_checkpoint_are_not_followed(path, tmp_path, capsys):
    """Though what they lead to is what was saved."""
    secret = tmp_path / "secret.json"
    (path / NEW / "hf" / "config.json").rename(secret)
    (path / NEW / "hf" / "config.json").symlink_to(secret)
    assert lorapre(["consolidate", str(path / NEW), str(tmp_path / "out")]) == 2
    assert "hf/config.json is a symbolic link, not a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["latest", f"{NEW}/manifest.json", f"{NEW}/checkpoint.json", f"{NEW}/tensors/.metadata"]
)
def test_a_fifo_is_named(name, path, capsys):
    (path / name).unlink()
    os.mkfifo(path / name)
    assert lorapre(["inspect", str(path)]) == 1
    chosen, complaints = newest_whole(path)
    assert chosen == path / (NEW if name == "latest" else OLD)
    assert f"{Path(name).name} is a FIFO, not a file" in complaints[0]


def test_latest_that_names_nothing_is_a_fault_of_the_folder(path, capsys):
    (path / "latest").write_text("step3")
    assert lorapre(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("whole") == 2 and f"{path}/latest names 'step3', which is not there" in out
    assert lorapre(["inspect", str(path), "--json"]) == 1
    shown = capsys.readouterr()
    assert [tag["whole"] for tag in json.loads(shown.out)] == [True, True]
    assert "names 'step3', which is not there" in shown.err
    assert newest_whole(path) == (path / NEW, [f"{path}/latest names 'step3', which is not there"])


def test_why_an_older_one_is_taken_is_true(path):
    (path / NEW / "manifest.json").unlink()
    chosen, complaints = newest_whole(path)
    assert chosen == path / OLD
    assert len(complaints) == 1 and f"{path}/{NEW} has no manifest.json" in complaints[0]
    (path / "latest").write_text(OLD)
    assert newest_whole(path)[1] == complaints


def test_a_checkpoint_whose_manifest_is_broken_is_not_deleted_with_the_old(path):
    (path / NEW / "manifest.json").write_text("{")
    assert folder.prune(path, 1, OLD) == []
    assert {p.name for p in folder.checkpoints(path)} == {OLD, NEW}


def test_the_manifest_is_sealed_whole(path):
    content = json.loads((path / NEW / "manifest.json").read_text())
    for key in ("tag", "step", "files"):
        changed = json.loads(json.dumps(content))
        changed[key] = {"tag": "step9", "step": 9, "files": {}}[key]
        (path / NEW / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=f"{NEW}: manifest.json has a wrong checksum"):
            Manifest.read(path / NEW)


class Asks:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_enums_of_deepspeeds_files_as_python_up_to_3_11_3_pickles_them(tmp_path):
    """It asks ``getattr`` for a member; nothing but a member of an enum that may be there is given."""
    for number, (enum, name) in enumerate([(ZeroStageEnum, "weights"), (ZeroStageEnum, "mro"), (torch.Size, "numel")]):
        torch.save({"stage": Asks(getattr, enum, name)}, tmp_path / f"{number}.pt")
    with files.weights_only(tmp_path):
        assert torch.load(tmp_path / "0.pt")["stage"] is ZeroStageEnum.weights
    for number in (1, 2):
        with pytest.raises(CheckpointError, match="cannot be read"), files.weights_only(tmp_path):
            torch.load(tmp_path / f"{number}.pt")


def test_deepspeeds_files_are_read_without_running_code(tmp_path):
    torch.save({"module": torch.ones(2)}, tmp_path / "good.pt")
    torch.save({"module": Harm(tmp_path / "harmed")}, tmp_path / "bad.pt")
    with files.weights_only(tmp_path):
        assert torch.load(tmp_path / "good.pt", weights_only=False)["module"].sum() == 2
    with pytest.raises(CheckpointError, match=r"cannot be read \(it asks for posix\.mkdir, which has no place"):  # noqa: SIM117
        with files.weights_only(tmp_path):
            torch.load(tmp_path / "bad.pt", weights_only=False)
    assert not (tmp_path / "harmed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    compressed(tmp_path / "large.pt", 1_000_000)
    with pytest.raises(CheckpointError, match=r"large.pt cannot be read"), files.weights_only(tmp_path):
        pass
    (tmp_path / "large.pt").unlink()
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(CheckpointError, match=r"fifo.pt is a FIFO, not a file"), files.weights_only(tmp_path):
        pass
