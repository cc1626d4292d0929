"""What must be in place before ranks start, each with one line about what is missing and on which host."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorapre_dist.config import ConfigError
from lorapre_dist.launcher.settings import ClusterSettings

PROBE = "lorapre_dist.launcher.probe"
HOST_LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?")
# Answers at once or not at all; a host that is cut off later is noticed within a minute.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
# Exit codes of the remote command line that no other program there gives.
NO_FOLDER, NO_PYTHON = 91, 92
PROGRAMS = {
    "pdsh": {"pdsh": "pdsh", "ssh": "openssh-client"},
    "torchrun": {"pdsh": "pdsh", "ssh": "openssh-client"},
    "openmpi": {"mpirun": "openmpi-bin", "ompi_info": "openmpi-bin", "ssh": "openssh-client"},
    "mpich": {"mpirun": "mpich", "ssh": "openssh-client"},
    "slurm": {"sbatch": "slurm-client", "srun": "slurm-client", "scontrol": "slurm-client"},
}


def read_hostfile(path: str) -> dict[str, int]:
    """Slots by host, in order: DeepSpeed's and Open MPI's common form.

    Raises:
        ConfigError: no such file, no host in it, a line that is not ``name slots=N``, a host twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"hostfile {path}: {reason}; it has a line 'name slots=N' for each host") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = HOST_LINE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"hostfile {path}, line {number}: {text!r} is not of the form 'name slots=N' with N above 0"
            )
        if found[1] in hosts:
            raise ConfigError(f"hostfile {path}, line {number}: {found[1]} is there twice; give all its slots once")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError(f"hostfile {path}: names no host; it has a line 'name slots=N' for each")
    return hosts


def check_programs(launcher: str) -> None:
    """The launcher's programs are installed here, and ``mpirun`` is of the right family.

    Raises:
        ConfigError: one is missing.
    """
    absent = {p: package for p, package in PROGRAMS[launcher].items() if shutil.which(p) is None}
    if absent:
        packages = " ".join(sorted(set(absent.values())))
        raise ConfigError(f"{', '.join(absent)} not found on PATH; on Debian and Ubuntu: apt-get install {packages}")
    if launcher in ("openmpi", "mpich"):
        said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout.lower()
        family = "openmpi" if "open-mpi" in said else "mpich" if "hydra" in said else "another MPI"
        if family != launcher:
            raise ConfigError(
                f"mpirun on PATH is {family}'s, not {launcher}'s: put the right one first, or change --launcher"
            )


def ssh(host: str, settings: ClusterSettings, command: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run a shell command on a host."""
    port = ["-p", str(settings.ssh_port)] if settings.ssh_port else []
    words = ["ssh", *SSH_OPTIONS, *port, host, command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


def check_hosts(hosts: Mapping[str, int], settings: ClusterSettings) -> str | None:
    """Ask every host at once; the address of the first on ``interface`` (None if no interface is named).

    Raises:
        ConfigError: a host that cannot be reached, or is not like this one; the first of several, and their number.
    """
    folder = Path.cwd() / settings.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hosts-") as shared, ThreadPoolExecutor(64) as pool:
            found = list(pool.map(lambda host: _ask(host, settings, shared.name), hosts))
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be written: {error.strerror}") from error
    first = next(iter(hosts))
    from lorapre_dist.launcher import probe

    here = probe.probe("", settings.master_port, "")
    complaints = [text for text in found if isinstance(text, str)]
    for (host, slots), answer in zip(hosts.items(), found, strict=True):
        if not isinstance(answer, str):
            complaints += _compare(host, slots, answer, here, settings, folder, host == first)
    if complaints:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        raise ConfigError(f"{complaints[0]}{more}")
    return next(answer["address"] for answer in found if not isinstance(answer, str))


def _ask(host: str, settings: ClusterSettings, shared: str) -> dict[str, Any] | str:
    """What the probe found on a host, or what is wrong with it."""
    python, arguments = shlex.quote(sys.executable), ["--port", str(settings.master_port), "--shared", shared]
    if settings.interface:
        arguments += ["--interface", settings.interface]
    given = shlex.join(f"{name}={value}" for name, value in where_modules_are().items())
    command = (
        f"cd {shlex.quote(os.getcwd())} 2>/dev/null || exit {NO_FOLDER}; test -x {python} || exit {NO_PYTHON}; "
        f"exec env {given} {python} -m {PROBE} {shlex.join(arguments)}"
    )
    try:
        done = ssh(host, settings, command)
    except subprocess.TimeoutExpired:
        return f"{host}: no answer within 120 s"
    said = " ".join(done.stderr.split())
    if done.returncode == NO_FOLDER:
        return f"{host}: {os.getcwd()} is not there; start in a folder that all hosts have, shared storage say"
    if done.returncode == NO_PYTHON:
        return f"{host}: {sys.executable} is not there; every host needs the same Python environment at the same path"
    if "No module named" in said and "lorapre_dist" in said:
        return f"{host}: lorapre_dist is not installed for {sys.executable}: pip install 'lorapre-dist[train]' there"
    if done.returncode == 255:
        return f"{host}: not reachable by ssh without a password: {said or 'no reason given'}"
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return f"{host}: could not be examined (exit code {done.returncode}): {said or done.stdout.strip()}"


def _compare(
    host: str,
    slots: int,
    there: dict[str, Any],
    here: dict[str, Any],
    settings: ClusterSettings,
    output: Path,
    first: bool,
) -> list[str]:
    """What is wrong with a host that answered."""
    found = []
    if there["python"] != here["python"]:
        found.append(f"{host}: Python {there['python']}, here it is {here['python']}")
    for package, version in here["versions"].items():
        if there["versions"][package] != version:
            found.append(
                f"{host}: {package} {there['versions'][package] or 'missing'}, here it is {version or 'missing'}"
            )
    if there["sources"] != here["sources"]:
        found.append(f"{host}: another state of lorapre_dist than here; install the same there, or copy it again")
    if settings.interface and there["address"] is None:
        known = ", ".join(there["interfaces"])
        found.append(f"{host}: network interface {settings.interface} has no IPv4 address; there: {known}")
    if not there["sees_shared"]:
        found.append(
            f"{host}: does not see this host's {output}; --output_dir must lie on storage that all hosts share"
        )
    if there["devices"] and there["devices"] < slots:
        found.append(f"{host}: slots={slots} in the hostfile, but {there['devices']} GPUs there")
    if first and not there["port_is_free"]:
        found.append(f"{host}: port {settings.master_port} is in use; set another master_port")
    return found


def where_modules_are() -> dict[str, str]:
    """``PYTHONPATH``, where it is set: the package may be a checkout that is not installed."""
    return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


def environment_of_ranks(settings: ClusterSettings, launcher: str, address: str | None) -> dict[str, str]:
    """Variables for every rank: the settings', and what the settings imply."""
    # ssh gives a plain PATH, and DeepSpeed's CPU op looks for ninja there.
    chosen = {"OMP_NUM_THREADS": str(settings.threads), "PATH": os.environ["PATH"]}
    if settings.interface:
        chosen |= {"GLOO_SOCKET_IFNAME": settings.interface, "NCCL_SOCKET_IFNAME": settings.interface}
    for name in ("TORCH_EXTENSIONS_DIR", "LORAPRE_CACHE"):
        if name in os.environ:
            chosen[name] = os.environ[name]
    if launcher == "openmpi":
        # Open MPI tells ranks their numbers, not where rank 0 is.
        chosen["MASTER_PORT"] = str(settings.master_port)
        if address:
            chosen["MASTER_ADDR"] = address
    if launcher == "torchrun":
        # Else all rounds of a rendezvous share a store, and a restarted rank may find the address in it that another
        # had before (pytorch/pytorch#135712).
        chosen["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return chosen | settings.environment
