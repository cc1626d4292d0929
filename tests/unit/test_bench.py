"""The benches of docs/results run, on small cases, and their figures are of what they say."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from lorapre_dist.bench import training
from lorapre_dist.bench.__main__ import BENCHES, main


def rows(text, first):
    """Words of the lines that begin with a number, from the line after the one that contains ``first``."""
    _, *lines = text[text.index(first) :].splitlines()
    return [line.split() for line in lines if line.split()[0].isdigit()]


@pytest.mark.parametrize("name", BENCHES)
def test_help_shows_what_it_is_for_as_it_is_written(name, capsys):
    """Commands in lines of their own."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    described = importlib.import_module(f"lorapre_dist.bench.{name}").__doc__
    assert described.strip() in said
    assert f"\n    python -m lorapre_dist.bench {name}" in described
    assert main([name, "--sede", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown option --sede")


@pytest.mark.parametrize("name", ["resume", "equality"])
def test_help_of_the_long_measurements_starts_nothing(name, capsys, monkeypatch):
    program = importlib.import_module(f"tests.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    assert program.__doc__.strip() in capsys.readouterr().out


def test_memory(capsys):
    assert (
        main(["memory", "--model", "llama-tiny", "--rank", "16", "--world_sizes", "1", "3", "--shape", "300", "200"])
        == 0
    )
    one, three = rows(capsys.readouterr().out, "ranks")
    assert [one[0], three[0]] == ["1", "3"]
    for row in (one, three):
        assert abs(float(row[3]) - 1) < 0.05
    assert abs(float(one[4]) / float(three[4]) - 3) < 0.1


def test_step(capsys, tmp_path):
    path = tmp_path / "step.json"
    assert main(["step", "--model", "llama-tiny", "--rank", "16", "--repeats", "2", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["rank_v"] == 2
    assert 0 < figures["bare GEMMs"][1] < figures["LoRAPre step"][0]
    assert 0 < figures["r x r work"][1] < figures["LoRAPre step"][0]
    all_parts, printed = "LoRAPre step / (these + r x r work)", capsys.readouterr().out
    assert figures["ratios"][all_parts][0] < figures["ratios"]["LoRAPre step / (bare GEMMs + memory pass)"][0]
    assert all_parts in printed


def test_experts(capsys):
    assert main(["experts", "--experts", "5", "--shape", "24", "32", "--rank", "4", "--repeats", "2"]) == 0
    (row,) = rows(capsys.readouterr().out, "stack of")
    assert row[:4] == ["5", "24x32", "4", "5"]
    assert all(float(cell) > 0 for cell in row[4:])


def test_bytes_of_muon_where_the_closed_form_does_not_hold(capsys):
    for shape in (["512", "256"], ["1023", "4096"], ["256", "512"]):
        assert main(["muon", "--parts", "bytes", "--shape", *shape]) == 2
        assert f"--shape {' '.join(shape)}: the closed form is of matrices" in capsys.readouterr().err


def test_runs_of_bench_weights_are_made_once(tmp_path, monkeypatch, capsys):
    """What is in the file is taken from there; a file of other settings is refused."""
    texts = [" ".join(f"word{(7 * i + j) % 97}" for j in range(40)) + f" end of text {i}." for i in range(60)]
    corpus, path = tmp_path / "corpus.jsonl", tmp_path / "weights.json"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = ["weights", "--steps", "1", "--batch", "2", "--seq_len", "16", "--json", str(path)]
    sizes += ["--dataset", str(corpus), "--data_cache", str(tmp_path / "cache")]
    assert main([*sizes, "--rows", "fp32"]) == 0
    first = json.loads(path.read_text())
    assert main([*sizes, "--rows", "fp32", "8bit_state"]) == 0
    both = json.loads(path.read_text())
    assert both["runs"]["fp32"] == first["runs"]["fp32"] and both["runs"].keys() == {"fp32", "8bit_state"}
    assert both["runs"]["8bit_state"]["0"]["batches"] == both["runs"]["fp32"]["0"]["batches"]
    monkeypatch.setattr(training, "train", None)  # nothing is left to train
    assert main([*sizes, "--rows", "fp32", "8bit_state"]) == 0
    assert "factors in 8 bits" in capsys.readouterr().out
    assert main([*sizes, "--lr", "0.5", "--rows", "fp32"]) == 2
    assert "holds runs with other settings" in capsys.readouterr().err


def test_a_gpu_bench_says_that_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert capsys.readouterr().err == "error: bench gpu: PyTorch finds no GPU here; bench step measures on a CPU\n"
    assert main(["gpu", "--model", "llama-2m"]) == 2
    assert "must be one of" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_bench_measures(capsys):
    main(["gpu", "--model", "llama-tiny", "--ranks", "8", "--repeats", "2"])
    text = capsys.readouterr().out
    assert text.count("kernels 'auto'") == 1 and text.count("as a CUDA graph") == 2
