from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lorapre_dist.bench import field
from lorapre_dist.bench.__main__ import main
from lorapre_dist.bench.field import command, report, runs
from lorapre_dist.bench.field.contender import BASE_LR, Beside
from lorapre_dist.bench.field.plan import Protocol, missing, search
from lorapre_dist.bench.field.registry import CONTENDERS, contender
from lorapre_dist.bench.field.setting import Setting
from lorapre_dist.bench.field.store import Store
from lorapre_dist.bench.training import EPS, Training
from lorapre_dist.config import ConfigError
from lorapre_dist.config.param_groups import param_groups

PROTOCOL = Protocol(Training(warmup=2), steps=10, screen_steps=5, seeds=(0, 1, 2))
OWN = (0.5, 1.0, 2.0, 4.0)


# contenders -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """A model of two layers, and tokens ``(2, 16)`` that it is to learn by heart."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=64, use_cache=False
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config), torch.randint(0, 64, (2, 16))


#: All that can run on a CPU but torchao's, which compile for minutes.
RUNNING = [name for name, known in CONTENDERS.items() if not known.cannot and known.package != "torchao"]


@pytest.mark.parametrize("name", RUNNING)
def test_every_contender_steps_the_matrices_alone_and_learns(name, toy):
    known = contender(name)
    if known.obstacle:
        pytest.skip(known.obstacle)
    model, tokens = copy.deepcopy(toy[0]), toy[1]
    named, rest = (dict(group["params"]) for group in param_groups(model))
    optimizer = Beside(model, known.lrs[1], known)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    # Not after the first step already: SOAP only looks at the first gradient.
    assert all(not torch.equal(p, before[key]) for key, p in named.items())
    assert losses[-1] < losses[0]
    stepped = {id(p) for group in optimizer.matrices.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in named.values()}
    others = {id(p): group["lr"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert others == {id(p): BASE_LR for p in rest.values()}
    assert 0 < optimizer.state_bytes() <= optimizer.kept_bytes()
    decays = [
        group.get("weight_decay", 0.0) for part in (optimizer.matrices, optimizer.adamw) for group in part.param_groups
    ]
    assert not any(decays), "weight decay is 0 in every row"


def test_bytes_of_state_are_those_of_the_moments(toy):
    def state(name):
        model = copy.deepcopy(toy[0])
        optimizer = Beside(model, 0.001, contender(name))
        model(input_ids=toy[1], labels=toy[1]).loss.backward()
        optimizer.step()
        return optimizer.state_bytes(), [p.shape for _, p in param_groups(model)[0]["params"]]

    adamw, shapes = state("adamw")
    # Two moments of fp32, and a step count of 4 bytes a matrix.
    assert adamw == sum(8 * p * q + 4 for p, q in shapes)
    ours, _ = state("lorapre-8+rank_v=1")
    # Factors of rank 32 / 8 and 1, and a number a row; beside them a count of skipped steps each, and one in all.
    factors = sum(4 * (5 * (p + q) + p) for p, q in shapes)
    assert factors <= ours <= factors + 8 * len(shapes) + 1024


def test_schedules_reach_the_contender(toy):
    optimizer = Beside(copy.deepcopy(toy[0]), 0.5, contender("lorapre-8"))
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert [group["lr"] for group in optimizer.matrices.param_groups] == [0.25]


def test_options_of_ours_and_of_torchs_can_be_given(toy):
    optimizer = Beside(copy.deepcopy(toy[0]), 0.5, contender("lorapre-8+residual=0.1+gammas=(0.1,0.2)"))
    assert optimizer.matrices.config.residual == 0.1 and optimizer.matrices.config.gammas == (0.1, 0.2)
    with pytest.raises(ConfigError, match="unknown contender 'lorapr-8': did you mean lorapre-8"):
        contender("lorapr-8")
    with pytest.raises(ConfigError, match="'residual' must be OPTION=VALUE"):
        contender("lorapre-8+residual")
    with pytest.raises(ConfigError, match="to ours and adamw, muon, adafactor alone, not to galore-8"):
        contender("galore-8+eps=1")
    (group,) = Beside(copy.deepcopy(toy[0]), 0.5, contender("muon+momentum=0.8")).matrices.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0)
    (group,) = Beside(copy.deepcopy(toy[0]), 0.5, contender("adamw+betas=(0.5,0.9)")).matrices.param_groups
    assert (group["betas"], group["eps"]) == ((0.5, 0.9), EPS)


def test_what_cannot_be_run_says_why(monkeypatch, options, capsys):
    assert contender("trion-8").obstacle.startswith("its package imports ista_daslab_cuda_tools")
    monkeypatch.setattr("lorapre_dist.config.extras.has", lambda module: module != "fira")
    assert contender("fira-8").obstacle == "not installed: pip install fira"
    assert not contender("adamw").obstacle
    field.main([*options, "--rows", "trion-8", "fira-8"])
    printed = capsys.readouterr().out
    assert "| Fira, hidden/8 | fira | cannot run: not installed: pip install fira |" in printed
    assert "| Trion, hidden/8 | ista-daslab-optimizers | cannot run: its package imports" in printed


# plan -----------------------------------------------------------------------------------------------------------


def done(losses, **more):
    """A store's ``get`` with short runs of these losses by lr."""
    known = {PROTOCOL.screen("x", lr): {"val_loss": loss} for lr, loss in losses.items()} | more.get("finals", {})
    return known.get


def test_search_goes_on_while_an_end_is_best():
    assert search("x", OWN, PROTOCOL, done({})).wanted == list(OWN)
    assert search("x", OWN, PROTOCOL, done({0.5: 3, 1.0: 1, 2.0: 2})).wanted == [4.0]
    inside = search("x", OWN, PROTOCOL, done({0.5: 3, 1.0: 1, 2.0: 2, 4.0: 3}))
    assert (inside.best, inside.inside, inside.wanted) == (1.0, True, [])
    assert search("x", OWN, PROTOCOL, done({0.5: 1, 1.0: 2, 2.0: 3, 4.0: 4})).wanted == [0.25]
    assert search("x", OWN, PROTOCOL, done({0.5: 4, 1.0: 3, 2.0: 2, 4.0: 1})).wanted == [8.0]
    # All diverged: lower.
    lost = dict.fromkeys(OWN, None)
    assert search("x", OWN, PROTOCOL, done(lost)).wanted == [0.25]
    lost |= {4.0 / 2**i: None for i in range(12)}
    ended = search("x", OWN, PROTOCOL, done(lost))
    assert ended.best is None and ended.wanted == []


def test_an_end_that_stays_best_is_taken_and_said():
    falling = search("x", OWN, PROTOCOL, done({0.5 * 2**i: 10 - i for i in range(20)}))
    assert falling.best == 4.0 * 2**6 and not falling.inside and not falling.wanted


def test_long_runs_follow_at_the_best_learning_rate():
    losses = {0.5: 3, 1.0: 1, 2.0: 2, 4.0: 3}
    wanted = missing("x", OWN, PROTOCOL, done(losses))
    assert [(s.lr, s.seed, s.steps) for s in wanted] == [(1.0, 0, 10), (1.0, 1, 10), (1.0, 2, 10)]
    first = {wanted[0]: {"val_loss": 1.0}}
    assert missing("x", OWN, PROTOCOL, done(losses, finals=first)) == wanted[1:]
    assert missing("x", OWN, replace(PROTOCOL, lrs=(7.0,)), done({}))[0].lr == 7.0
    error = {wanted[0]: {"error": "no"}}
    assert missing("x", OWN, PROTOCOL, done(losses, finals=error)) == []


def test_a_contender_that_cannot_run_is_tried_once():
    get = {PROTOCOL.screen("x", 0.5): {"error": "needs CUDA"}}.get
    assert search("x", OWN, PROTOCOL, get).error == "needs CUDA"
    assert missing("x", OWN, PROTOCOL, get) == []


# store ----------------------------------------------------------------------------------------------------------


def record(name="adamw", lr=1.0, seed=0, steps=PROTOCOL.steps, loss=4.0, **more):
    short = steps == PROTOCOL.screen_steps
    setting = replace(PROTOCOL.screen(name, lr), seed=seed) if short else PROTOCOL.final(name, lr, seed)
    measured = {"rank": 0, "state_bytes": 1024, "kept_bytes": 1024, "peak_bytes": 2048, "step_ms": 1.0, "seconds": 5.0}
    curve = {} if loss is None else {"5": loss + 1, "10": loss}
    return setting.as_record() | measured | {"val_loss": loss, "curve": curve} | more


def test_records_are_found_again_and_a_cut_line_is_passed_by(tmp_path):
    path = tmp_path / "runs" / "runs.jsonl"
    store = Store(path)
    store.add(record())
    store.add(record(seed=1))
    assert Store(path).get(Setting.of(record(seed=1))) == record(seed=1)
    with path.open("a") as file:
        file.write('{"contender": "ada')
    again = Store(path)
    assert len(again.records) == 2
    again.add(record(seed=2))
    with pytest.raises(ConfigError, match=r"runs.jsonl, line 3: not a record"):
        Store(path)


# report ---------------------------------------------------------------------------------------------------------


def table_of(tmp_path, *records):
    store = Store(tmp_path / "runs.jsonl")
    for each in records:
        store.add(each)
    names = list(dict.fromkeys(each["contender"] for each in records))
    return report.rows(store, PROTOCOL, names)


def test_means_spreads_and_differences_by_seed(tmp_path):
    adamw = [record(seed=seed, loss=4.0 + 0.1 * seed) for seed in range(3)]
    ours = [record("lorapre-8", seed=seed, loss=4.1 + 0.1 * seed, rank=16, state_bytes=512) for seed in range(2)]
    found = table_of(tmp_path, *adamw, *ours)
    first, second = report.compared(found).splitlines()[2:]
    assert first.startswith(
        "| AdamW | - | torch | 1 (given) | 4.100 ± 0.100 | 3 | - | - | 1 KiB | 100.0% | 2 KiB | 1.0 |"
    )
    # Of the seeds that both have: each 0.1 behind.
    assert "| 4.150 ± 0.050 | 2 | +0.100 ± 0.000 | - | 0 KiB | 50.0% |" in second
    # Both are at the one learning rate of which there are runs; the search is still to be done.
    assert "4 to try" in report.lacking(found, PROTOCOL)


def test_steps_to_adamws_loss_are_read_off_the_curve():
    curve = {"10": 6.0, "20": 5.0, "30": 4.0}
    assert report.crossing(curve, 4.5) == pytest.approx(25)
    assert report.crossing(curve, 4.0) == pytest.approx(30)
    assert report.crossing(curve, 6.5) == 10
    assert report.crossing(curve, 3.9) is None
    assert report.crossing({"10": None}, 3.9) is None


def test_searches_errors_and_divergence_are_told(tmp_path):
    short = [
        record(lr=lr, steps=5, loss=loss) for lr, loss in ((0.0005, 4.3), (0.001, 4.1), (0.002, None), (0.004, 4.4))
    ]
    lost = [record("lion", lr=lr, steps=5, loss=None) for lr in contender("lion").lrs]
    found = table_of(tmp_path, *short, *lost, record("racs", 0.01, steps=5, error="needs CUDA"))
    lines = report.searched(found).splitlines()
    assert "4.300 (0.0005), **4.100** (0.001), diverged (0.002), 4.400 (0.004) | 4.100 | - | yes |" in lines[2]
    text = report.page(found, PROTOCOL)
    assert "| RACS | pytorch-optimizer | cannot run: needs CUDA |" in text
    assert "| AdamW | torch | 0 of 3 seeds |" in text
    assert "| Lion | pytorch-optimizer | 4 learning rates tried, 1 to try; 0 of 3 seeds |" in text


def test_options_of_ours_are_compared_with_none(tmp_path):
    table_of(
        tmp_path,
        record(loss=4.0),
        record("lorapre-8", loss=4.1),
        record("lorapre-8+residual=0.1", loss=4.05),
        record("lorapre-8+residual=0.1", lr=2.0, seed=1, loss=4.3),
        record("lorapre-32", loss=4.2),
    )
    lines = report.varied(Store(tmp_path / "runs.jsonl"), PROTOCOL, "lorapre-8").splitlines()[2:]
    assert lines == ["| as it is | 1 | 4.100 | 1 | - | +0.100 |", "| residual=0.1 | 1 | 4.050 | 1 | -0.050 | +0.050 |"]


def test_exchanged_parts_are_compared_with_the_optimizer(tmp_path):
    table_of(tmp_path, record("lorapre-8", loss=4.1), record("lorapre-dense-8+m=full", loss=4.0))
    store = Store(tmp_path / "runs.jsonl")
    lines = report.varied(store, PROTOCOL, "lorapre-8", "lorapre-dense-8").splitlines()[2:]
    assert lines == ["| as it is | 1 | 4.100 | 1 | - | - |", "| m=full | 1 | 4.000 | 1 | -0.100 | - |"]
    assert "lorapre-dense-8" not in CONTENDERS


def test_costs_are_those_of_the_longest_run(tmp_path):
    table_of(
        tmp_path,
        record(state_bytes=4096),
        record("lion", steps=5, state_bytes=2048, step_ms=9.0),
        record("lion", state_bytes=2048, step_ms=3.0),
        record("racs", error="needs CUDA"),
    )
    lines = report.costs(Store(tmp_path / "runs.jsonl"), PROTOCOL.training).splitlines()[2:]
    assert lines == [
        "| Lion | pytorch-optimizer | 2 KiB | 50.0% | 1 KiB | 2 KiB | 3.0 |",
        "| AdamW | torch | 4 KiB | 100.0% | 1 KiB | 2 KiB | 1.0 |",
    ]


def test_csv_and_figure(tmp_path):
    found = table_of(tmp_path, record(), record("lorapre-8"), record("lion", loss=math.nan))
    assert report.as_csv(found).splitlines()[1].startswith("adamw,0,1.0,0,4.0,1024")
    report.figure(found).savefig(tmp_path / "x.svg")
    assert "LoRAPre" in (tmp_path / "x.svg").read_text() or (tmp_path / "x.svg").stat().st_size > 5000


# the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Three steps of two short sequences on a small text."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("field")
    texts = [" ".join(f"word{(7 * i + j) % 97}" for j in range(40)) + f" end of text {i}." for i in range(60)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = ["--steps", "3", "--screen_steps", "2", "--batch", "2", "--seq_len", "16", "--seeds", "0"]
    return [*sizes, "--dataset", str(corpus), "--data_cache", str(folder / "cache"), "--out", str(folder / "out")]


@pytest.mark.slow
def test_a_table_is_extended_not_done_again(options, capsys):
    rows = ["--rows", "adamw", "lorapre-8", "--lrs", "0.001"]
    field.main([*options, *rows])
    printed = capsys.readouterr()
    assert printed.err.count("s of CPU)") == 2 and printed.out.count("\n| ") == 4
    folder = options[options.index("--out") + 1]
    first = Store(command.Path(folder) / "runs.jsonl")
    # Same weights, same tokens: the same loss before any optimizer has acted. It repeats exactly in this process.
    assert len({r["tokens"] for r in first}) == 1
    for known in first:
        again = runs.run(Setting.of(known), runs.Place("cpu", 1, options[options.index("--data_cache") + 1]))
        assert again["val_loss"] == pytest.approx(known["val_loss"], abs=2e-5)
        assert again["tokens"] == known["tokens"] and again["state_bytes"] == known["state_bytes"]
    field.main([*options, *rows])
    assert "of CPU" not in capsys.readouterr().err
    assert sorted(p.name for p in command.Path(folder).iterdir() if p.suffix != ".lock") == [
        *("field.csv", "field.md", "field.svg", "runs.jsonl")
    ]


def test_a_contender_that_fails_stays_a_row_that_says_why(options, monkeypatch):
    setting = replace(PROTOCOL.final("adamw", 0.001, 0), dataset=options[options.index("--dataset") + 1])
    setting = replace(setting, batch=2, seq_len=16, steps=3)

    def build(matrices, lr):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(CONTENDERS, "broken", replace(CONTENDERS["adamw"], build=build))
    place = runs.Place("cpu", 2, options[options.index("--data_cache") + 1])
    assert runs.run(replace(setting, contender="broken"), place)["error"] == "RuntimeError: no kernel"


def test_bad_input_is_one_line(options, capsys):
    for given, message in {
        ("--lrs", "-1"): "--lrs -1.0: must be positive numbers",
        ("--jobs", "0"): "--jobs 0: must be at least 1",
        ("--report", "--out", "/nowhere/at/all"): "--out /nowhere/at/all --report: no runs are recorded there",
        ("--seeds", "1", "1"): "--seeds 1 1: one of them is given twice",
        ("--rows", "lorapr-8"): "unknown contender 'lorapr-8': did you mean lorapre-8? one of",
    }.items():
        assert main(["field", *options, *given]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["field", *options, "--device", "cuda"]) == 2
        assert "--device cuda: PyTorch finds no GPU here" in capsys.readouterr().err
    assert main(["fild"]) == 2
    assert "did you mean field?" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert main([]) == 2


STAYS = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from lorapre_dist.bench.field import pool

def stay():
    print("begun", flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    queue.put("cpu")
    ProcessPoolExecutor(1, context, pool._begin, (queue, {}, 1)).submit(stay).result()
"""


@pytest.mark.slow
def test_runs_end_with_a_command_that_was_killed(tmp_path):
    """Without being told, a process of a pool would finish its run, and then wait for another one for ever."""
    script = tmp_path / "command.py"
    script.write_text(STAYS)
    command = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert command.stdout.readline() == "begun\n"
    command.kill()
    assert command.communicate(timeout=60)[0] == ""
