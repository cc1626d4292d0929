"""One command line per launcher, from the same settings; and what tells its ranks to stop."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorapre_dist.config import ConfigError, shipped
from lorapre_dist.integrations.deepspeed import quiet
from lorapre_dist.launcher.checks import SSH_OPTIONS, environment_of_ranks, where_modules_are
from lorapre_dist.launcher.settings import ClusterSettings

#: What every rank runs, from the package: hosts need no clone. By file: DeepSpeed's way to start a module under MPICH
#: starts its own helper as one, too, which is none.
PRETRAIN = str(shipped.file("pretrain.py"))
BATCH_SCRIPT = str(shipped.file("slurm.sbatch"))


@dataclass(frozen=True)
class Launch:
    """What to run on this host.

    Attributes:
        words: the command.
        variables: its environment, beside the present one.
        ranks: environment of every rank, where the launcher reads it from a file; else empty.
        stop: signal and regular expression of the processes on each host that must get it.
    """

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, str] = field(default_factory=dict)
    stop: tuple[str, str] = ("", "")

    def shown(self) -> str:
        """As a shell would take it."""
        given = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*given, shlex.join(self.words)])


def build(launcher: str, settings: ClusterSettings, hosts: Mapping[str, int], address: str | None) -> Launch:
    """The command of ``launcher`` on ``hosts``; ``address`` is the first host's on the chosen interface.

    Raises:
        ConfigError: the launcher cannot start such a world.
    """
    ranks = environment_of_ranks(settings, launcher, address)
    if launcher == "slurm":
        return _slurm(settings, ranks)
    if launcher in ("mpich", "torchrun") and len(set(hosts.values())) > 1:
        told = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        raise ConfigError(f"{launcher} starts the same number of ranks on every host; the hostfile says {told}")
    if launcher == "torchrun":
        return _torchrun(settings, hosts, ranks, address)
    return _deepspeed(launcher, settings, ranks, address)


def ranks_file(settings: ClusterSettings) -> Path:
    """Where DeepSpeed's launcher reads the environment of the ranks from."""
    return Path.cwd() / settings.output_dir / "ranks.env"


def _deepspeed(launcher: str, settings: ClusterSettings, ranks: dict[str, str], address: str | None) -> Launch:
    words = ["deepspeed", "--hostfile", os.path.abspath(settings.hostfile), "--force_multi", "--launcher", launcher]
    if address:
        words += ["--master_addr", address]
    words += ["--master_port", str(settings.master_port)]
    if quiet.wanted():  # of the launcher, which says each of its steps on every host
        words += ["--log_level", "error"]
    if settings.ssh_port:
        words += ["--ssh_port", str(settings.ssh_port)]
    variables = {"DS_ENV_FILE": str(ranks_file(settings))}
    if launcher == "pdsh":
        variables["PDSH_SSH_ARGS_APPEND"] = " ".join(SSH_OPTIONS)
    elif launcher == "openmpi":
        words += ["--launcher_args", _openmpi_options(settings)]
    else:
        words += ["--launcher_args", shlex.join(["-bind-to", "none", *_flag("-iface", settings.interface)])]
        # Hydra knows no option for ssh's options.
        variables["HYDRA_LAUNCHER_EXTRA_ARGS"] = shlex.join([*_port(settings), *SSH_OPTIONS])
    # The rank itself, not the launcher before it, whose command line goes on in the same way.
    pattern = rf"^[^ ]*python[^ ]* -u {re.escape(PRETRAIN)} .*{_output_of(settings)}"
    return Launch([*words, PRETRAIN, *settings.pretrain], variables, ranks, ("USR1", pattern))


def _openmpi_options(settings: ClusterSettings) -> str:
    if not settings.interface:
        raise ConfigError(
            f"{settings.path}: [hosts] interface is empty; DeepSpeed would tell Open MPI to use eth0: name it"
        )
    options = ["--bind-to", "none"]  # else every rank is bound to one core, whatever OMP_NUM_THREADS says
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    for layer in ("btl", "oob"):
        options += ["--mca", f"{layer}_tcp_if_include", settings.interface]
    for name, value in _keepalive(float(settings.option("collective_timeout") or 600)).items():
        options += ["--mca", f"oob_tcp_keepalive_{name}", str(value)]
    options += ["--mca", "plm_rsh_args", shlex.join([*_port(settings), *SSH_OPTIONS])]
    return shlex.join(options)


def _keepalive(collective_timeout: float) -> dict[str, int]:
    """Seconds after which ``mpirun`` takes a silent host for lost: 45 as with ssh, not its own 480.

    It must notice before the ranks do: a host that it has something to say to is not probed, but waited for in vain.
    """
    interval = max(1, int(min(45.0, collective_timeout / 2) / 5))
    return {"time": 2 * interval, "intvl": interval, "probes": 3}


def _torchrun(
    settings: ClusterSettings, hosts: Mapping[str, int], ranks: dict[str, str], address: str | None
) -> Launch:
    first, least = next(iter(hosts)), settings.min_hosts or len(hosts)
    if least > len(hosts):
        raise ConfigError(f"[torchrun] min_hosts = {least}, but the hostfile has {len(hosts)}")
    name = re.sub(r"\W", "_", str(settings.output_dir))
    agent = [
        *(sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d", "--rdzv_id", name),
        *("--nnodes", f"{least}:{len(hosts)}", "--nproc_per_node", str(hosts[first])),
        *("--rdzv_endpoint", f"{address or first}:{settings.master_port}", "--max_restarts", str(settings.restarts)),
        # Room for a step and a checkpoint between the agent's SIGTERM and SIGKILL.
        *("--shutdown_timeout", "300", PRETRAIN, *settings.pretrain),
    ]
    exported = " ".join(f"{key}={shlex.quote(value)}" for key, value in (where_modules_are() | ranks).items())
    remote = f"cd {shlex.quote(os.getcwd())} && exec env {exported} {shlex.join(agent)}"
    variables = {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": shlex.join([*_port(settings), *SSH_OPTIONS])}
    pattern = rf"^[^ ]*python[^ ]* -m torch\.distributed\.run .*--rdzv_id {name} "
    return Launch(["pdsh", "-S", "-w", ",".join(hosts), remote], variables, {}, ("TERM", pattern))


def _slurm(settings: ClusterSettings, ranks: dict[str, str]) -> Launch:
    words = ["sbatch", f"--chdir={os.getcwd()}", *settings.slurm, BATCH_SCRIPT, sys.executable, "-u", PRETRAIN]
    return Launch([*words, *settings.pretrain], where_modules_are() | ranks)


def _output_of(settings: ClusterSettings) -> str:
    return rf"--output_dir[ =]{re.escape(str(settings.option('output_dir')))}( |$)"


def _port(settings: ClusterSettings) -> list[str]:
    return _flag("-p", str(settings.ssh_port or ""))


def _flag(name: str, value: str) -> list[str]:
    return [name, value] if value else []
