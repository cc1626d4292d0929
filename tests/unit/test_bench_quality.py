from __future__ import annotations

import json
import math
import sys

import pytest

from lorapre_dist.bench import contenders, quality
from lorapre_dist.bench.__main__ import main
from lorapre_dist.config import ConfigError

LRS = ["--lrs", "0.001", "0.002"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Three steps of two short sequences on a small text; llama-tiny itself takes a few seconds at most."""
    folder = tmp_path_factory.mktemp("quality")
    texts = [" ".join(f"word{(7 * i + j) % 97}" for j in range(40)) + f" end of text {i}." for i in range(60)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = ["--steps", "3", "--batch", "2", "--seq_len", "16"]
    return [*sizes, "--dataset", str(corpus), "--data_cache", str(folder / "cache")]


def measure(options, path):
    quality.main([*options, "--json", str(path)])
    return json.loads(path.read_text())


def losses(figures):
    return [(run["row"], run["matrix_lr"], run["val_loss"], run["train_losses"]) for run in figures["runs"]]


@pytest.mark.slow
def test_every_row_runs_on_the_same_batches_and_repeats_exactly(options, tmp_path, capsys):
    pytest.importorskip("galore_torch")
    first = measure([*options, *LRS], tmp_path / "first.json")
    assert [run["row"] for run in first["runs"]] == [name for name in quality.ROWS for _ in range(2)]
    assert len({run["batches"] for run in first["runs"]}) == 1
    # The first loss is that of the initial weights, before any optimizer has acted.
    assert len({run["train_losses"][0] for run in first["runs"]}) == 1
    assert len({run["train_losses"][-1] for run in first["runs"]}) == len(first["runs"])
    assert all(run["val_loss"] < first["loss_before"] for run in first["runs"])
    printed = capsys.readouterr().out
    assert printed.count("| best |") == len(quality.ROWS)
    assert "stable-r16: " in printed and "limit +0.05" in printed
    assert losses(measure([*options, *LRS], tmp_path / "second.json")) == losses(first)
    other = measure([*options, *LRS, "--seed", "1", "--rows", "adamw"], tmp_path / "other.json")
    assert other["runs"][0]["batches"] != first["runs"][0]["batches"]


def test_only_the_matrices_differ_between_rows(options):
    model = quality.prepare(quality._parse(options)).model
    matrices, rest = contenders.split(model)
    # q, k, v, o, gate, up and down of four layers; embeddings, lm_head, two norms a layer and the last one.
    assert (len(matrices), len(rest)) == (28, 11)
    for name in ("adamw", "stable-r16", "paper-r16"):
        optimizer = quality.ROWS[name].build(model, 0.002)
        lrs = {
            id(p): g["lr"] * (1 if name == "adamw" else g["scale"]) for g in optimizer.param_groups for p in g["params"]
        }
        assert all(lrs[id(p)] == pytest.approx(0.002) for p in matrices)
        base = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert all(base[id(p)] == 0.01 for p in rest)


def test_galore_is_left_out_with_a_message_where_it_is_missing(options, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    quality.main([*options, "--lrs", "0.001", "--rows", "adamw", "galore-r16"])
    printed = capsys.readouterr()
    assert printed.err.count("galore-torch is not installed") == 1
    assert "| AdamW |" in printed.out and "GaLore" not in printed.out


def test_table_marks_the_best_and_the_remarks_judge_it():
    runs = [
        quality.Run("adamw", 0.0005, 4.4, 1.0, "", [], {}),
        quality.Run("adamw", 0.001, 4.3, 1.0, "", [], {}),
        quality.Run("adamw", 0.002, 4.5, 1.0, "", [], {}),
        quality.Run("stable-r16", 0.001, 4.36, 1.0, "", [], {}),
        quality.Run("paper-r16", 0.001, math.inf, 1.0, "", [], {}),
    ]
    lines = quality.table(runs).splitlines()[2:]
    assert ["best" in line for line in lines] == [False, True, False, True, True]
    assert "**4.300**" in lines[1] and "+0.060" in lines[3] and "diverged" in lines[4]
    assert quality.remarks(runs) == ["stable-r16: +0.060 nats against AdamW, limit +0.05: NOT MET"]
    assert "the lowest one" in quality.remarks([runs[1], runs[2]])[0]


def test_bad_input_is_one_line(options, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--lrs"):
        quality.main([*options, "--lrs", "-1"])
    with pytest.raises(ConfigError, match="--json"):
        quality.main([*options, "--json", str(tmp_path / "nowhere" / "x.json")])
    with pytest.raises(ConfigError, match="max_steps"):
        quality.main([*options, "--steps", "0"])
    assert main(["qualty"]) == 2
    assert "did you mean quality?" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert main([]) == 2
