"""The front of the launchers: settings, hostfile, the commands it builds, and errors in one line; no host needed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from lorapre_dist.config import ConfigError
from lorapre_dist.launcher import app, checks, commands, probe
from lorapre_dist.launcher.commands import build
from lorapre_dist.launcher.settings import read_settings
from lorapre_dist.training.run import discovery, interruption
from tests.launch.conftest import REPO, ds_json

INI = """
[hosts]
hostfile = {folder}/hosts
interface = lan0
threads = 4
[environment]
NCCL_DEBUG = WARN
[torchrun]
min_hosts = 1
[slurm]
nodes = 2
exclusive = true
[pretrain]
model = llama-tiny
deepspeed_config = {folder}/ds.json
output_dir = {folder}/run
no_progress = true
wandb = false
max_steps = 50
"""


@pytest.fixture
def ini(tmp_path: Path) -> Path:
    ds_json(tmp_path / "ds.json")
    (tmp_path / "hosts").write_text("# two\n\nhost-a slots=2  # fast\nhost-b slots=2\n")
    (tmp_path / "cluster.ini").write_text(INI.format(folder=tmp_path))
    return tmp_path / "cluster.ini"


def words_of(ini: Path, launcher: str, *more: str) -> list[str]:
    settings = read_settings(str(ini), more)
    return build(launcher, settings, checks.read_hostfile(settings.hostfile), "10.0.0.1").words


def test_options_reach_pretrain_under_every_launcher(ini):
    expected = ["--model", "llama-tiny", "--deepspeed_config", str(ini.with_name("ds.json"))]
    for launcher in app.LAUNCHERS:
        words = words_of(ini, launcher, "--max_steps", "9")
        if launcher == "torchrun":
            words = shlex.split(words[-1])
        options = words[words.index(commands.PRETRAIN) + 1 :]
        assert options[:4] == expected
        assert "--no_progress" in options and "--wandb" not in options
        assert options[-2:] == ["--max_steps", "9"]


def test_commands(ini):
    words = words_of(ini, "pdsh")
    assert words[:4] == ["deepspeed", "--hostfile", str(ini.with_name("hosts")), "--force_multi"]
    assert words[words.index("--master_addr") + 1] == "10.0.0.1"
    openmpi = words_of(ini, "openmpi")
    assert "btl_tcp_if_include lan0" in openmpi[openmpi.index("--launcher_args") + 1]
    remote = words_of(ini, "torchrun")[-1]
    assert "--nnodes 1:2 --nproc_per_node 2 --rdzv_endpoint 10.0.0.1:29500 --max_restarts 3" in remote
    assert "NCCL_DEBUG=WARN" in remote and "GLOO_SOCKET_IFNAME=lan0" in remote and "OMP_NUM_THREADS=4" in remote
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in remote
    sbatch, *options, script = words_of(ini, "slurm")[:5]
    assert [sbatch, *options] == ["sbatch", f"--chdir={os.getcwd()}", "--nodes=2", "--exclusive"]
    assert Path(script).read_bytes() == (REPO / "launch" / "slurm.sbatch").read_bytes()


def test_dry_run_prints_a_command_that_a_shell_takes(ini, capsys):
    assert app.main([str(ini), "--dry_run", "--hosts", "host-b"]) == 0
    *variables, command = capsys.readouterr().out.splitlines()
    assert "# for every rank: NCCL_DEBUG=WARN" in variables
    assert shlex.split(command)[2:4] == ["deepspeed", "--hostfile"]


def test_the_example_is_valid(ini):
    """Every setting of launch/cluster.ini is known, and pretrain.py takes its options."""
    settings = read_settings(str(REPO / "launch" / "cluster.ini"))
    app._check_pretrain(settings, 0)
    assert settings.interface == "eth0" and settings.threads == 8 and settings.min_hosts is None
    for line in (REPO / "launch" / "deepspeed_env.example").read_text().splitlines():
        name, value = line.split("=", 1)  # DeepSpeed reads it so, and fails on anything else
        assert name and value


BAD = {
    "[hosts]\nhostfile = /nowhere/hosts": "hostfile /nowhere/hosts: No such file",
    "[hosts]\nhostfil = hosts": "hostfil is unknown: did you mean hostfile?",
    "[host]\n": "unknown section [host]: did you mean [hosts]?",
    "[hosts]\nthreads = many": "threads = many: must be a whole number",
    "[hosts]\nmaster_port = 80": "master_port = 80: must be a whole number from 1024",
    "[environment]\n2X = 1": "2X: not the name of an environment variable",
    "[hosts]\nhostfile = {folder}/hosts\n[pretrain]\ndeepspeed_config = x\nmodle = x": "unknown option --modle",
    "[hosts]\nhostfile = {folder}/hosts\n[pretrain]\ndeepspeed_config = none.json": "none.json: no such file",
    "threads = 1": "no section headers",
    "[hosts]\nthreads = 1\nthreads = 2": "already exists",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_settings_end_with_one_line(text, ini, capsys):
    ini.write_text(text.format(folder=ini.parent) + "\n")
    assert app.main([str(ini)]) == 2
    assert BAD[text] in (err := capsys.readouterr().err)
    assert err.startswith("error: ") and err.count("\n") == 1


HOSTFILES = {
    "": "names no host",
    "host-a\n": "line 1: 'host-a' is not of the form",
    "host-a slots=0\n": "N above 0",
    "host-a slots=2\nhost-a slots=1\n": "line 2: host-a is there twice",
}


@pytest.mark.parametrize("text", HOSTFILES)
def test_bad_hostfiles(text, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=HOSTFILES[text].replace("(", r"\(")):
        checks.read_hostfile(str(tmp_path / "hosts"))


def test_what_a_launcher_cannot_start_is_refused(ini, monkeypatch, capsys):
    assert app.main([str(ini), "--dry_run", "--hosts", "host-c"]) == 2
    assert "'host-c' is not in the hostfile; there: host-a, host-b" in capsys.readouterr().err
    # Four ranks fit the batch of 8 and the micro-batch of 2, three do not.
    ini.with_name("hosts").write_text("host-a slots=2\nhost-b slots=1\n")
    assert app.main([str(ini), "--dry_run"]) == 2
    assert "train_batch_size" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="host-a 2, host-b 1"):
        words_of(ini, "torchrun")
    ini.write_text(ini.read_text().replace("lan0", ""))
    with pytest.raises(ConfigError, match="interface is empty"):
        words_of(ini, "openmpi")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="pdsh, ssh not found on PATH; on Debian and Ubuntu: apt-get install"):
        checks.check_programs("pdsh")


def test_differences_between_hosts_are_named(ini):
    settings = read_settings(str(ini))
    here = probe.probe("lo", 1, "")
    assert here["address"] == "127.0.0.1"
    assert checks._compare("b", 2, here, here, settings, ini.parent, False) == []
    changes = {
        "python": ("3.9.1", "Python 3.9.1"),
        "sources": ("0", "another state of lorapre_dist"),
        "address": (None, "interface lan0 has no IPv4 address; there: "),
        "sees_shared": (False, "storage that all hosts share"),
        "devices": (1, "slots=2 in the hostfile, but 1 GPUs"),
        "versions": (here["versions"] | {"torch": "1.0"}, "torch 1.0, here it is"),
        "port_is_free": (False, "port 29500 is in use"),
    }
    for name, (value, text) in changes.items():
        found = checks._compare("b", 2, here | {name: value}, here, settings, ini.parent, True)
        assert len(found) == 1 and found[0].startswith("b: ") and text in found[0]


def test_ranks_under_slurm(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "45123"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    discovery.find_ranks()
    env = discovery.os.environ
    found = [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "1", "4", "10.0.0.1", "25123"]
    for name in ("RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="SLURM_LOCALID is not set"):
        discovery.find_ranks()


def test_lost_ranks_are_told_from_other_errors():
    text = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [10.0.0.2]:41. Bad"
    assert interruption.lost_rank(RuntimeError(text)) == "Connection closed by peer [10.0.0.2]:41"
    assert interruption.lost_rank(dist.DistNetworkError("The client socket has timed out")) is not None
    assert interruption.lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    # As a checkpoint is being written, the ranks are asked once more how it went, over the same connection.
    again = RuntimeError("Application timeout caused pair closure")
    assert interruption.lost_rank(again) == "Application timeout caused pair closure"
    again.__context__ = RuntimeError(text)
    assert interruption.lost_rank(again) == "Connection closed by peer [10.0.0.2]:41"


@pytest.mark.slow
def test_every_group_waits_no_longer_than_it_should(tmp_path):
    """Also a group that a library makes without naming a timeout."""
    script = f"""
import torch
import torch.distributed as dist
from lorapre_dist.training.run.interruption import limit_waits
limit = limit_waits(7)
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1, timeout=limit)
for group in (dist.group.WORLD, dist.new_group([0])):
    print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.stdout.split()[-2:] == ["7.0", "7.0"], done.stderr


def test_output_that_nobody_reads_ends_nothing(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
from lorapre_dist.training.run.interruption import outlive_the_terminal
outlive_the_terminal()
for _ in range(20000):
    print("a line that is long enough to fill a pipe", flush=True)
open({str(tmp_path / "end")!r}, "w").close()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").exists()
