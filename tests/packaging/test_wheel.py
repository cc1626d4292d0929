"""What ``pip install lorapre-dist`` gives: the distributions' content, and the package in environments of its own."""

from __future__ import annotations

import email
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lorapre_dist
from lorapre_dist.config.extras import EXTRAS
from tests.launch.conftest import REPO, TINY_LLAMA, free_port
from tests.packaging.conftest import run

pytestmark = pytest.mark.slow

FSDP2 = Path(__file__).with_name("fsdp2.py")
SCRIPTS = ("cluster.ini", "slurm.sbatch", "deepspeed_env.example", "pretrain.py")
SHIPPED = {
    **{f"shipped/ds_configs/{path.name}": path for path in (REPO / "ds_configs").glob("*.json")},
    **{f"shipped/{name}": REPO / "launch" / name for name in SCRIPTS},
    **{str(path.relative_to(REPO / "lorapre_dist")): path for path in (REPO / "lorapre_dist").rglob("*.py")},
    "py.typed": REPO / "lorapre_dist" / "py.typed",
}


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(files.read(name))


def test_the_wheel_holds_the_package_with_its_files_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as files:
        inside = {n.removeprefix("lorapre_dist/"): files.read(n) for n in files.namelist() if ".dist-info/" not in n}
    assert inside == {name: path.read_bytes() for name, path in SHIPPED.items()}


def test_the_sdist_holds_what_is_run_in_a_clone(sdist):
    with tarfile.open(sdist) as archive:
        inside = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    outside = {str(path.relative_to(REPO)) for name in ("ds_configs", "launch") for path in (REPO / name).glob("*.*")}
    assert outside | {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt", "CHANGELOG.md"} <= inside


def test_the_version_is_written_once(wheel):
    assert metadata_of(wheel)["Version"] == lorapre_dist.__version__
    files = [*(REPO / "lorapre_dist").rglob("*.py"), REPO / "setup.py", REPO / "pyproject.toml"]
    stated = re.compile(rf'^\W*(__)?version(__)?\W+= ?"{re.escape(lorapre_dist.__version__)}"', re.MULTILINE)
    assert [path.name for path in files if stated.search(path.read_text())] == ["__init__.py"]


def test_extras_are_what_the_code_asks_for(wheel):
    """torch and numpy for all; each extra installs what :data:`EXTRAS` says is imported of it, and is pinned for CI."""
    asked: dict[str, set[str]] = {}
    for requirement in map(Requirement, metadata_of(wheel).get_all("Requires-Dist")):
        found = re.search(r'extra == "(\w+)"', str(requirement.marker))
        asked.setdefault(found[1] if found else "", set()).add(canonicalize_name(requirement.name))
    assert asked[""] == {"torch", "numpy"}
    assert asked.keys() == {"", "deepspeed", "train", "hf", "finetune", "mpi", "bench", "test", "docs", "wandb", "all"}
    for extra, packages in EXTRAS.items():
        assert {canonicalize_name(package) for package in packages} <= asked[extra], extra
    assert asked["all"] == set.union(*(asked[name] for name in EXTRAS if name != "wandb"))
    pins = {canonicalize_name(line.split("==")[0]) for line in (REPO / "constraints.txt").read_text().splitlines()}
    unpinned = {"triton"}  # PyTorch for CUDA asks for a version of its own, and a pin would contradict it
    assert set.union(*(asked[name] for name in asked if name != "wandb")) - unpinned <= pins


IMPORT = """
import logging, sys, time, torch

class Unread(list):
    def __getitem__(self, place): raise AssertionError("sys.argv is read")
    def __iter__(self): raise AssertionError("sys.argv is read")

sys.argv = Unread(["program", "--help"])
def loggers():
    names = [None, *logging.root.manager.loggerDict]
    return {n: (g.level, g.handlers[:], g.filters[:], g.propagate) for n in names if (g := logging.getLogger(n))}
def unchanged(): return loggers(), logging.root.manager.disable, sys.stdout, sys.stderr
before, begun = unchanged(), time.process_time()
import lorapre_dist
seconds = time.process_time() - begun
after = unchanged()
assert after[1:] == before[1:] and {n: after[0][n] for n in before[0]} == before[0], "logging is changed"
assert hasattr(torch.optim, "LoRAPre") and lorapre_dist.LoRAPre is torch.optim.LoRAPre
print(seconds, lorapre_dist.__file__)
"""


def test_an_import_is_cheap_and_changes_nothing(alone, tmp_path):
    """At most 0.3 s of the processor beside torch's own; no logger, stream or command line is touched."""
    seconds, place = run(alone / "python", "-c", IMPORT, cwd=tmp_path).stdout.split()
    assert float(seconds) < 0.3 and Path(place).is_relative_to(alone.parent)


def test_fsdp2_with_torch_alone(alone, tmp_path):
    launcher = [alone / "python", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    said = run(*launcher, "--master_port", str(free_port()), FSDP2, "saved", cwd=tmp_path).stdout
    lines = re.findall(r"rank (\d): (\S+) (\S+) (\d) matrices", said)
    assert sorted(rank for rank, *_ in lines) == ["0", "1"], said
    assert all(float(after) < float(before) / 4 and count == "4" for _, before, after, count in lines), said
    found = run(alone / "lorapre", "inspect", "saved/step20", "--json", cwd=tmp_path)
    assert json.loads(found.stdout)["whole"]


TRAIN, HF = "pip install 'lorapre-dist[train]'", "pip install 'lorapre-dist[hf]'"
DEEPSPEED = "pip install 'lorapre-dist[deepspeed]'"
# Each line of a program in an environment with torch alone, and how it must end.
LACKING = {
    ("pretrain", "--deepspeed_config", "tiny_zero2"): TRAIN,
    ("finetune", "--model", "m", "--deepspeed_config", "tiny_zero2"): TRAIN,
    ("launch", "cluster.ini", "--dry_run"): TRAIN,
    ("tokenize", "out"): TRAIN,
    ("plan", "--model", "gpt2"): TRAIN,
    ("plan", "--model", "llama-60m", "--plot", "plan.png"): TRAIN,
    ("plan", "--model", "llama-60m", "--deepspeed_config", "tiny_zero2"): DEEPSPEED,
}
RUN = """
import contextlib, io, json, sys
from lorapre_dist import cli
from lorapre_dist.training.run import program
program.script = lambda main: sys.exit(main())  # else it ends this process
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue()])
from lorapre_dist.bench.__main__ import main
with contextlib.redirect_stderr(io.StringIO()) as said:
    found.append([main(["field", "--out", "runs", "--steps", "1"]), said.getvalue()])
for use in (lambda: __import__("lorapre_dist").initialize, lambda: __import__("lorapre_dist.training.hf_trainer")):
    try:
        use()
    except ImportError as error:
        found.append([2, f"error: {error}\\n"])
print(json.dumps(found))
"""


def test_a_missing_extra_is_one_line_with_its_command(alone, tmp_path):
    run(alone / "lorapre", "configs", "--copy", ".", cwd=tmp_path)
    (tmp_path / "hosts").write_text("host-a slots=2\n")
    done = run(alone / "python", "-c", RUN, json.dumps([list(words) for words in LACKING]), cwd=tmp_path)
    expected = [*LACKING.values(), TRAIN, DEEPSPEED, HF]
    for (code, said), command in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        assert code == 2 and re.fullmatch(r"error: (.+: )?needs .+: " + re.escape(command) + "\n", said), said
    for script in ("hf_trainer.py", "accelerate_train.py"):
        said = run(alone / "python", REPO / "launch" / script, "--output_dir", "x", cwd=tmp_path, code=2).stderr
        assert said.endswith(f"{HF}\n") and said.count("\n") == 1


def test_pretraining_outside_any_clone(everything, tmp_path):
    """As installed: the configuration by its name, the console script, no file of the repository."""
    (tmp_path / "model.json").write_text(json.dumps(TINY_LLAMA))
    options = ["--model_config", "model.json", "--deepspeed_config", "tiny_zero2", "--seq_len", "32"]
    options += ["--vocab_size", "400", "--max_steps", "3", "--eval_batches", "1", "--output_dir", "run"]
    said = run(everything / "lorapre", "pretrain", *options, "--data_cache", "cache", cwd=tmp_path).stdout
    assert "ZeRO-2, 1 ranks" in said and "after 3 steps" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_the_front_starts_what_is_installed(everything, tmp_path):
    """Every rank starts from the package: a host needs the environment and no clone."""
    run(everything / "lorapre", "configs", "--copy", ".", cwd=tmp_path)
    (tmp_path / "hosts").write_text("host-a slots=2\nhost-b slots=2\n")
    said = run(everything / "lorapre", "launch", "cluster.ini", "--dry_run", cwd=tmp_path).stdout
    (script,) = re.findall(r" (\S+) --model llama-1b --deepspeed_config llama_1b_zero2 ", said)
    assert Path(script).is_relative_to(everything.parent)
    assert Path(script).read_bytes() == (REPO / "launch" / "pretrain.py").read_bytes()
