"""Checkpoints as folders: what is there at each moment of a save, and after it was killed there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorapre_dist.checkpoint import folder
from lorapre_dist.checkpoint.folder import Manifest


def written(directory: Path, tag: str, content: str = "x") -> Manifest:
    path = folder.start(directory, tag)
    (path / "file").write_text(content)
    return Manifest(tag, len(content), {"file": folder.describe(path / "file")})


def published(directory: Path, tag: str, content: str = "x") -> Path:
    return folder.publish(directory, written(directory, tag, content), save_latest=True)


class Killed(Exception):
    pass


def killed_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on the ``number``-th rename of a folder ends the process, as it were."""
    rename, count = Path.rename, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)


@pytest.mark.parametrize("number", [1, 2])
def test_a_tag_that_is_saved_again_is_never_without_a_whole_checkpoint(number, tmp_path, monkeypatch):
    published(tmp_path, "tag", "old")
    manifest = written(tmp_path, "tag", "newer")
    with monkeypatch.context() as patch:
        killed_at_rename(patch, number)
        with pytest.raises(Killed):
            folder.publish(tmp_path, manifest, save_latest=True)
    assert folder.choose(tmp_path, None) == ["tag"]
    assert (tmp_path / "tag" / "file").read_text() == ("old" if number == 1 else "newer")
    assert folder.damage(tmp_path / "tag", Manifest.read(tmp_path / "tag")) == []
    published(tmp_path, "next")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "next", "tag"]


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    written(tmp_path, "tag")
    assert folder.choose(tmp_path, None) == []
    published(tmp_path, "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "other"]


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for content in ("1", "22", "333", "4444"):
        published(tmp_path, f"step{len(content)}", content)
    assert folder.prune(tmp_path, 2, "step1") == ["step2"]
    assert [p.name for p in folder.checkpoints(tmp_path)] == ["step4", "step3", "step1"]


def test_a_prune_that_is_killed_leaves_no_damaged_checkpoint(tmp_path, monkeypatch):
    for content in ("1", "22"):
        published(tmp_path, f"step{len(content)}", content)

    def killed(path: Path, **_: object) -> None:
        (path / "file").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            folder.prune(tmp_path, 1, "step2")
    assert folder.choose(tmp_path, None) == ["step2"]
    assert [p.name for p in folder.checkpoints(tmp_path)] == ["step2"]


def test_a_missing_latest_is_named_with_what_is_there(tmp_path):
    published(tmp_path, "one")
    (tmp_path / "latest").unlink()
    assert folder.choose(tmp_path, None) == f"{tmp_path} has no file 'latest'; name one of: one"
    assert folder.choose(tmp_path, "one") == ["one"]
    assert folder.choose(tmp_path, "two") == f"no checkpoint 'two' in {tmp_path}; there: one"
