from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorapre_dist.training.data.documents import Source, open_source
from lorapre_dist.training.run.settings import Settings, load_settings

BASE_CONFIG = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_settings(tmp_path: Path, cache: Path) -> Callable[..., Settings]:
    """Settings from options, on a DeepSpeed JSON that some of ``ds`` is merged into."""

    def make(*options: str, ds: dict[str, Any] | None = None, world_size: int = 1) -> Settings:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(BASE_CONFIG | (ds or {})))
        return load_settings(["--deepspeed_config", str(path), "--data_cache", str(cache), *options], world_size)

    return make


def documents(count: int, words: int = 40) -> list[str]:
    """Distinct documents of ``words`` words."""
    return [" ".join(f"word{(7 * i + j) % 97}" for j in range(words)) + f" end of document {i}." for i in range(count)]


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents as JSON lines, with a second column."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t, "number": i}) + "\n" for i, t in enumerate(documents(120))))
    return path


def source_of(path: Any, **options: Any) -> Source:
    given = {"config": None, "split": "train", "column": None, "streaming": False} | options
    return open_source(str(path), **given)


def hub_folder(path: Path, *, validation: bool) -> Path:
    """A local folder in the form of a hub dataset: a card that names the files of each split, sharded."""
    texts = documents(120)
    for shard in range(4):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[shard::4]]
        (path / f"train-{shard}.jsonl").write_text("".join(rows))
    splits = "    - split: train\n      path: train-*.jsonl\n"
    if validation:
        rows = [json.dumps({"text": f"held out {i} " * 30}) + "\n" for i in range(20)]
        (path / "validation.jsonl").write_text("".join(rows))
        splits += "    - split: validation\n      path: validation.jsonl\n"
    (path / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  data_files:\n{splits}---\n")
    return path
