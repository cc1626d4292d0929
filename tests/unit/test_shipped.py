"""Files that the package brings, the names that stand for them, and what is said where an extra is missing."""

from __future__ import annotations

import pytest

from lorapre_dist.config import ConfigError, ds_json, extras, shipped
from lorapre_dist.training.run import program, settings
from lorapre_dist.training.run.interruption import _program


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_name_or_file_name_stands_for_a_shipped_configuration():
    names = shipped.configs()
    assert {"tiny_zero2", "llama_60m_zero2", "hf_zero2"} <= names.keys()
    for name, path in names.items():
        assert ds_json.read(name) == ds_json.read(f"{name}.json") == ds_json.read(path)
    taken = settings.load_settings(["--deepspeed_config", "tiny_zero2"], world_size=2)
    assert taken.ds_config == ds_json.read(names["tiny_zero2"])


def test_a_file_of_that_name_comes_first(tmp_path):
    (tmp_path / "tiny_zero2.json").write_text('{"train_batch_size": 3}')
    assert ds_json.read("tiny_zero2.json") == {"train_batch_size": 3}
    assert ds_json.read("tiny_zero2") != {"train_batch_size": 3}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("llama_60m_zero", r"^no such file; did you mean llama_60m_zero\d, which is shipped\? \(lorapre configs"),
        ("ds_configs/tiny_zero4.json", "did you mean tiny_zero"),
        ("nothing", "^no such file$"),
    ],
)
def test_a_name_that_is_none_gives_the_nearest(given, words):
    with pytest.raises(ConfigError, match=words):
        ds_json.read(given)


def test_initialize_takes_a_name(monkeypatch):
    """DeepSpeed itself opens the file, wherever the name was given."""
    from argparse import Namespace

    from lorapre_dist.integrations.deepspeed import bind

    def initialize(args=None, model=None, config=None, config_params=None):
        return args, model, config, config_params

    monkeypatch.setattr(bind.ds, "initialize", initialize)
    path, options = shipped.configs()["tiny_zero2"], Namespace(deepspeed_config="tiny_zero2", local_rank=0)
    assert bind.initialize(model=1, config="tiny_zero2") == (None, 1, path, None)
    assert bind.initialize(None, 1, config_params="tiny_zero2.json") == (None, 1, None, path)
    taken, *rest = bind.initialize(options, 1)
    assert taken == Namespace(deepspeed_config=path, local_rank=0) and rest == [1, None, None]
    assert options.deepspeed_config == "tiny_zero2"
    as_given = ds_json.read(path)
    assert bind.initialize(model=1, config=as_given)[2] is as_given


def test_copies(tmp_path):
    copies = shipped.copy(tmp_path / "mine")
    assert {path.name for path in copies} == {*(f"{n}.json" for n in shipped.configs()), *shipped.LAUNCH_FILES}
    assert all(not path.is_symlink() and path.stat().st_size for path in copies)
    shipped.copy(tmp_path / "mine")  # what is there already is the same
    changed, kept = tmp_path / "mine" / "cluster.ini", tmp_path / "mine" / "tiny_zero2.json"
    changed.write_text("[hosts]\n")
    kept.unlink()
    with pytest.raises(ConfigError, match=r"cluster\.ini: is there and differs; --overwrite"):
        shipped.copy(tmp_path / "mine")
    assert changed.read_text() == "[hosts]\n" and not kept.exists()
    shipped.copy(tmp_path / "mine", overwrite=True)
    assert changed.read_bytes() == shipped.file("cluster.ini").read_bytes() and kept.exists()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    extras.need("deepspeed")
    monkeypatch.setattr(extras, "has", lambda package: package not in ("tqdm", "galore_torch"))
    extras.need("train", "transformers")
    with pytest.raises(ImportError, match=r"^needs tqdm, galore-torch: pip install 'lorapre-dist\[bench\]'$") as caught:
        extras.need("bench")
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(ConfigError, match=r"^--plot: needs tqdm: pip install 'lorapre-dist\[train\]'$"):
        extras.need("train", "matplotlib", "tqdm", why="--plot")
    monkeypatch.setattr(extras, "has", lambda package: False)
    with pytest.raises(ConfigError, match=r"^needs deepspeed, hjson, pydantic and 8 more: pip"):
        extras.need("train")
    with pytest.raises(SystemExit) as ended:
        extras.need_or_exit("mpi")
    assert ended.value.code == 2


@pytest.mark.parametrize("words", [["pretrain", "--seed", "3"], ["--local_rank=1", "pretrain", "--seed", "3"]])
def test_the_launcher_may_put_the_local_rank_first(words, monkeypatch):
    """``deepspeed --module lorapre_dist pretrain``: it comes before the program's own words."""
    from lorapre_dist import cli
    from lorapre_dist.training.run import app

    monkeypatch.setattr(program, "script", lambda main: main())
    taken = []
    monkeypatch.setattr(app, "main", taken.append)
    cli.main(words)
    assert taken == [["--seed", "3", *words[:-3]]]
    assert _program(["/bin/python", "-u", "-m", "lorapre_dist", *words]) == "lorapre_dist"
