"""``lorapre consolidate`` and ``lorapre inspect`` on checkpoints of a small Llama that one process saved."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorapre_dist import LoRAPre, __version__
from lorapre_dist.checkpoint import safetensors_files, stored
from lorapre_dist.checkpoint.run import Job, save
from lorapre_dist.cli import COMMANDS, main

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
RANK = 4


def tokens(step: int) -> torch.Tensor:
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(step))


def trained(tied: bool, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, LoRAPre]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = LoRAPre(model.named_parameters(), lr=0.01, rank=RANK)
    for step in range(2):
        optimizer.zero_grad()
        model(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
    return model.eval(), optimizer


def job(model: LlamaForCausalLM, optimizer: LoRAPre, step: int = 2, hf: bool = True) -> Job:
    def model_files(path: Path) -> None:
        model.config.save_pretrained(path / "hf")
        (path / "hf" / "tokenizer.json").write_text("{}")

    return Job(
        optimizer,
        step,
        aliases=TIED if model.config.tie_word_embeddings else {},
        extra={"client_state": {"trainer": 1}, "engine": {"global_steps": step}},
        also=model_files if hf else None,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(request, tmp_path_factory):
    """A run's folder with one checkpoint, the model and the optimizer."""
    model, optimizer = trained(request.param)
    folder = tmp_path_factory.mktemp("run")
    save(job(model, optimizer), folder / "checkpoints", "step2")
    return folder, model, optimizer


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint to spoil, without config.json."""
    model, optimizer = trained(tied=False)
    return save(job(model, optimizer, hf=False), tmp_path / "run", "step2")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(9)).logits


def all_tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Through the index, which must name every tensor's file, and no file may hold another."""
    index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    assert sum(len(held) for held in files.values()) == len(index["weight_map"])
    assert sum(t.nbytes for held in files.values() for t in held.values()) == index["metadata"]["total_size"]
    assert {p.name for p in folder.glob(f"{stem}-*")} == set(files)
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def spoil(path: Path) -> Path:
    """Change one byte of one of the checkpoint's files."""
    file = next((path / "tensors").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


# consolidate --------------------------------------------------------------------------------------------------------


def test_transformers_loads_the_folder(run, tmp_path, capsys):
    folder, model, _ = run
    out = tmp_path / "out"
    assert main(["consolidate", str(folder / "checkpoints" / "step2"), str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.dtype == torch.float32
    assert ("lm_head.weight" in all_tensors(out, "model")) != model.config.tie_word_embeddings
    assert (out / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_optimizer_state_is_there_by_name(run, tmp_path):
    folder, _, optimizer = run
    main(["consolidate", str(folder), str(tmp_path / "out")])
    found = all_tensors(tmp_path / "out", "optimizer")
    summary = json.loads((tmp_path / "out" / "optimizer.json").read_text())
    for bound in optimizer.bound():
        entry = summary["parameters"][bound.piece.name]
        assert entry["step"] == bound.state.step == 2
        assert entry["shape"] == list(bound.piece.shape)
        for key, tensor in bound.state.tensors().items():
            held = found.pop(f"{bound.piece.name}.{key}")
            assert torch.equal(held, tensor.view(bound.piece.shape) if key.startswith("exp") else tensor)
    assert not found
    q_proj = summary["parameters"]["model.layers.0.self_attn.q_proj.weight"]
    assert (q_proj["kind"], q_proj["rank"], q_proj["rank_v"], q_proj["variant"]) == ("lorapre", RANK, 1, "stable")
    assert summary["step"] == 2 and summary["param_groups"][0]["lr"] == 0.01


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_weights_in_another_type(name, dtype, run, tmp_path):
    folder, model, _ = run
    out = tmp_path / "out"
    assert main(["consolidate", str(folder), str(out), "--dtype", name, "--no-optimizer"]) == 0
    assert not list(out.glob("optimizer*"))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype
    for key, p in model.named_parameters():
        assert torch.equal(loaded.get_parameter(key), p.to(dtype)), key


def test_what_fp16_cannot_hold_is_refused(tmp_path, capsys):
    model, optimizer = trained(tied=False)
    model.model.norm.weight.data[3] = 1e5
    path = save(job(model, optimizer), tmp_path / "run", "big")
    assert main(["consolidate", str(path), str(tmp_path / "out"), "--dtype", "fp16"]) == 2
    assert "model.norm.weight has elements beyond fp16's 65504" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_files_are_cut_and_keep_their_order(run, tmp_path, monkeypatch):
    folder, model, _ = run
    monkeypatch.setattr(safetensors_files, "FILE_BYTES", 10_000)
    out = tmp_path / "out"
    main(["consolidate", str(folder), str(out)])
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(file, "pt") as held:
            assert held.metadata() == {"format": "pt"}
            sizes = [held.get_tensor(name).nbytes for name in held.keys()]  # noqa: SIM118
        assert sum(sizes) <= 10_000 or len(sizes) == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def test_a_run_means_its_latest_checkpoint(run, tmp_path, capsys):
    folder, _, _ = run
    for k, path in enumerate([folder, folder / "checkpoints"]):
        assert main(["consolidate", str(path), str(tmp_path / str(k))]) == 0
        assert f"latest checkpoint: {folder / 'checkpoints' / 'step2'}" in capsys.readouterr().out
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    assert main(["consolidate", str(tmp_path / "a"), str(tmp_path / "b")]) == 2


def test_without_config_it_says_how_to_give_one(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["consolidate", str(checkpoint), str(out)]) == 0
    assert "note: no config.json" in capsys.readouterr().out
    model, _ = trained(tied=False)
    model.save_pretrained(tmp_path / "given")
    for given in (tmp_path / "given", tmp_path / "given" / "config.json"):
        arguments = ["consolidate", str(checkpoint), str(out), "--overwrite", "--config", str(given)]
        assert main(arguments) == 0
        assert "note" not in capsys.readouterr().out
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
        assert (out / "generation_config.json").is_file() == given.is_dir()
        assert not (out / "model.safetensors").exists()
    (tmp_path / "bad.json").write_text("{}")
    assert main(["consolidate", str(checkpoint), str(tmp_path / "c"), "--config", str(tmp_path / "bad.json")]) == 2
    assert "no 'model_type'" in capsys.readouterr().err


def test_a_config_that_does_not_tie_gets_both_names(tmp_path):
    """Where a program tied the tensors itself, transformers would start ``lm_head`` at random."""
    model, optimizer = trained(tied=True)
    model.config.tie_word_embeddings = False
    saved = job(model, optimizer)
    saved.aliases = TIED
    path = save(saved, tmp_path / "run", "tied")
    main(["consolidate", str(path), str(tmp_path / "out")])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    file = spoil(checkpoint)
    assert main(["consolidate", str(checkpoint), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"tensors/{file.name} has a wrong checksum" in error
    assert not (tmp_path / "out").exists()


def test_what_lies_in_the_way_is_kept(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for more, words in (([], "is not empty"), (["--overwrite"], "holds something else")):
        assert main(["consolidate", str(checkpoint), str(out), *more]) == 2
        assert words in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    for wrong in (checkpoint, checkpoint.parent, checkpoint / "out", out / "thesis.tex"):
        assert main(["consolidate", str(checkpoint), str(wrong), "--overwrite"]) == 2
    assert main(["inspect", str(checkpoint)]) == 0
    (out / "thesis.tex").unlink()
    assert main(["consolidate", str(checkpoint), str(out)]) == 0
    assert main(["consolidate", str(checkpoint), str(out)]) == 2
    assert main(["consolidate", str(checkpoint), str(out), "--overwrite"]) == 0


# the files' form ----------------------------------------------------------------------------------------------------


def test_parts_of_rows_and_of_columns_fall_into_place(tmp_path):
    """As ranks write them: runs of a vector, rows of B, columns of A; compared with what the library writes."""
    whole = {
        "rows": torch.randn(7, 3),
        "columns": torch.randn(3, 10).bfloat16(),
        "flat": torch.arange(12.0),
        "count": torch.tensor([5]),
        "flag": torch.tensor([True, False, True]),
    }
    cuts = {"rows": (0, (4,)), "columns": (1, (1, 8)), "flat": (0, (5, 6)), "count": (0, ()), "flag": (0, ())}
    shapes = {"flat": (4, 3), "count": ()}
    entries = []
    for name, tensor in whole.items():
        dim, at = cuts[name]
        bounds, parts = [0, *at, tensor.shape[dim]], []
        for k, (start, stop) in enumerate(itertools.pairwise(bounds)):
            file = tmp_path / f"{name}{k}"
            piece = tensor.narrow(dim, start, stop - start).clone()
            with open(file, "wb") as stream:
                stream.write(b"before")
                torch.save(piece, stream)
                size = stream.tell() - 6
                stream.write(b"after")
            offsets = tuple(start if d == dim else 0 for d in range(tensor.dim()))
            parts.append(stored.Part(offsets, tuple(piece.shape), piece.dtype, file, 6, size))
        source = stored.StoredTensor(tuple(tensor.shape), tensor.dtype, tuple(parts))
        entries.append(safetensors_files.Entry(name, shapes.get(name, tuple(tensor.shape)), tensor.dtype, source))
    safetensors_files.write(tmp_path, "x", entries)
    want = {name: tensor.reshape(shapes.get(name, tensor.shape)) for name, tensor in whole.items()}
    found = all_tensors(tmp_path, "x")
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    save_file(want, tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "y.safetensors").stat().st_size == (tmp_path / "x-00001-of-00001.safetensors").stat().st_size


# inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_is_there(run, capsys):
    folder, model, optimizer = run
    path = str(folder / "checkpoints" / "step2")
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    tied = model.config.tie_word_embeddings
    assert text.startswith(f"{path}: whole\n")
    for words in ("step           2, written by 1 rank", "stable, rank 4, rank_v 1", "lr             0.01"):
        assert words in text
    assert f"14 low-rank, {7 - tied} AdamW, 0 untrained" in text
    assert ("lm_head.weight is model.embed_tokens.weight" in text) == tied
    assert "client_state   trainer" in text and "engine         global_steps" in text

    assert main(["inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] and found["step"] == 2 and "parameters" not in found
    assert found["bytes"]["weights"] == 4 * sum(p.numel() for p in model.parameters())
    held = sum(t.nbytes for bound in optimizer.bound() for t in bound.state.tensors().values())
    assert found["bytes"]["optimizer"] == held
    assert found["files"].keys() >= {"checkpoint.json", "extra.pt", "hf/config.json"}


def test_inspect_lists_tensors(run, capsys):
    folder, model, _ = run
    path = str(folder / "checkpoints" / "step2")
    assert main(["inspect", path, "--tensors"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "model.layers.1.mlp.down_proj.weight low-rank 32 x 44 4, 1 2" in lines
    assert "model.norm.weight AdamW 32 - 2" in lines
    assert main(["inspect", path, "--tensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"].keys() == dict(model.named_parameters()).keys()


def test_inspect_names_every_problem(checkpoint, capsys):
    file = spoil(checkpoint)
    (checkpoint / "extra.pt").unlink()
    (checkpoint / "stray").write_text("")
    assert main(["inspect", str(checkpoint)]) == 1
    text = capsys.readouterr().out
    assert ": DAMAGED\n" in text and "step           2" in text
    for words in (f"tensors/{file.name} has a wrong checksum", "extra.pt is missing", "stray does not belong to it"):
        assert f"  problem        {words}\n" in text
    assert main(["inspect", str(checkpoint), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3


@pytest.mark.parametrize("name", ["manifest.json", "checkpoint.json", "tensors/.metadata"])
@pytest.mark.parametrize("content", [None, b"", b"[]"])
def test_inspect_survives_any_damage(name, content, checkpoint, capsys):
    (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content)
    assert main(["inspect", str(checkpoint)]) == 1
    assert name.removeprefix("tensors/") in capsys.readouterr().out
    assert main(["inspect", str(checkpoint.parent)]) == 1


def test_inspect_shows_several_newest_first(tmp_path, capsys):
    model, optimizer = trained(tied=False)
    for step in (2, 3, 4):
        path = save(job(model, optimizer, step), tmp_path / "checkpoints", f"step{step}")
    assert main(["consolidate", str(path), str(tmp_path / "checkpoints" / "hf")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tag", "step4", "step3", "step2"]
    assert "(latest)" in lines[1] and all(line.endswith("whole") for line in lines[1:])
    spoil(tmp_path / "checkpoints" / "step3")
    assert main(["inspect", str(tmp_path / "checkpoints"), "--json"]) == 1
    assert [tag["whole"] for tag in json.loads(capsys.readouterr().out)] == [True, False, True]
    assert main(["inspect", str(tmp_path), "--tensors"]) == 2


# the command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name a command"),
        (["inspct"], "did you mean inspect?"),
        (["inspect", ".", "--jsn"], "did you mean --json?"),
        (["inspect"], "required: path"),
        (["inspect", "/nowhere"], "/nowhere: no such folder"),
        (["consolidate", "/", "/nowhere"], "neither a checkpoint"),
        (["consolidate", ".", "/nowhere", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_help_has_an_example_of_each_command(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        for name, command in COMMANDS.items():
            if name in arguments or arguments == ["--help"]:
                assert f"lorapre {name} {command.example}" in text


def test_as_a_program_it_prints_the_result_alone():
    """DeepSpeed speaks on stdout while it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "lorapre_dist", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"lorapre {__version__}\n")
