"""Hosts made of namespaces: each has its own address, name, processes, ``/dev/shm`` and sshd, all share the files.

What a host needs is in the kernel and dies with its first process, so nothing stays behind, whatever happens. Needs
root, ``unshare``, ``nsenter``, ``ip`` and ``sshd``; :func:`missing` says what is not there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NETWORK = "10.77.0"
INTERFACE = "lan0"
# Runs as the first process of a host: takes its name, mounts what hosts do not share, and waits. The parent sends a
# line when the network is there.
FIRST_PROCESS = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd && chmod 755 /run/sshd
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch /etc/nsswitch.conf
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
echo ready
read -r _
{sshd} -f {folder}/sshd_{name}
echo up
exec sleep infinity
"""
SSH_CONFIG = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
MaxStartups 100
"""


def missing(*programs: str) -> str | None:
    """Why there can be no hosts here, or None; ``programs`` are others that a test needs."""
    if os.name != "posix" or os.geteuid() != 0:
        return "namespaces need root"
    absent = [
        p for p in ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen", *programs) if find(p) is None
    ]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: openssh-server, pdsh, openmpi-bin, mpich, slurm-wlm)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"this kernel or container makes no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


class Hosts:
    """``with Hosts(folder, ["host-a", "host-b"]) as hosts: hosts.start("host-a", ["hostname"])``."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self.addresses = {name: f"{NETWORK}.{k + 1}" for k, name in enumerate(self.names)}
        self._first: dict[str, subprocess.Popen[str]] = {}
        self._switch: subprocess.Popen[str] | None = None

    def __enter__(self) -> Hosts:
        try:
            self._write_files()
            self._switch = _hold(["unshare", "--net", "--kill-child", "--fork", "bash", "-c", "echo; sleep infinity"])
            self._on_switch("link", "add", "br0", "type", "bridge")
            self._on_switch("link", "set", "br0", "up")
            for name in self.names:
                self._add(name)
            self._wait_for_ssh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._first.values(), self._switch]:
            if process is not None:
                process.kill()  # --kill-child: the host's first process, and with it every process and link
                process.wait()

    def start(self, host: str, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on a host, in a session of its own."""
        entered = [*self._enter(host), *command]
        defaults: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(entered, start_new_session=True, **(defaults | options))  # type: ignore[call-overload]

    def run(self, host: str, command: Sequence[str], timeout: float = 60.0) -> str:
        """What a short command prints on a host."""
        done = subprocess.run([*self._enter(host), *command], capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{command} on {host}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def processes(self, host: str, pattern: str) -> list[int]:
        """Process ids, as that host numbers them, of command lines that match."""
        found = subprocess.run([*self._enter(host), "pgrep", "-f", pattern], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def signal(self, host: str, pattern: str, number: signal.Signals) -> int:
        """Send a signal to the processes of one host whose command line matches; how many there were."""
        pids = self.processes(host, pattern)
        if pids:
            self.run(host, ["kill", f"-{number.name.removeprefix('SIG')}", *map(str, pids)])
        return len(pids)

    def cut_off(self, host: str) -> None:
        """Pull the host's cable: nothing is closed and nothing is refused, packets just end."""
        self._on_switch("link", "set", self._port(host), "down")

    def reconnect(self, host: str) -> None:
        self._on_switch("link", "set", self._port(host), "up")

    def power_off(self, host: str) -> None:
        """All processes of the host, at once."""
        self._first[host].kill()
        self._first[host].wait()

    def hostfile(self, slots: int, names: Sequence[str] | None = None) -> Path:
        """A hostfile of some of the hosts (default: all)."""
        chosen = self.names if names is None else names
        path = self.folder / f"hostfile-{'-'.join(chosen)}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in chosen))
        return path

    def _write_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "key"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        # There is no name server to ask: every question would end in a time-out.
        (self.folder / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        for name, address in self.addresses.items():
            (self.folder / f"sshd_{name}").write_text(SSHD_CONFIG.format(folder=self.folder, address=address))

    def _add(self, name: str) -> None:
        script = FIRST_PROCESS.format(name=name, folder=self.folder, sshd=find("sshd"))
        flags = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        first = self._first[name] = _hold(["unshare", *flags, "bash", "-c", script])
        inner = _child(first.pid)
        port, assert_switch = self._port(name), self._switch
        assert assert_switch is not None
        self._on_switch("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", str(inner))
        self._on_switch("link", "set", port, "master", "br0", "up")
        for command in (
            ["addr", "add", f"{self.addresses[name]}/24", "dev", INTERFACE],
            ["link", "set", INTERFACE, "up"],
            ["link", "set", "lo", "up"],
        ):
            self.run(name, ["ip", *command])
        assert first.stdin is not None
        first.stdin.write("go\n")
        first.stdin.flush()

    def _wait_for_ssh(self) -> None:
        for name in self.names:
            for _ in range(100):
                try:
                    self.run(self.names[0], ["ssh", "-o", "ConnectTimeout=2", name, "true"], timeout=10)
                    break
                except RuntimeError:
                    time.sleep(0.1)
            else:
                raise RuntimeError(f"no sshd answers on {name}")

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name)}"

    def _enter(self, host: str) -> list[str]:
        target = str(_child(self._first[host].pid))
        return [
            "nsenter",
            "--target",
            target,
            "--net",
            "--uts",
            "--ipc",
            "--mount",
            "--pid",
            f"--wd={os.getcwd()}",
            "--",
        ]

    def _on_switch(self, *command: str) -> None:
        assert self._switch is not None
        entered = ["nsenter", "--target", str(_child(self._switch.pid)), "--net", "ip", *command]
        subprocess.run(entered, check=True, capture_output=True)


def _hold(command: list[str]) -> subprocess.Popen[str]:
    """Start what keeps namespaces alive until this process ends, however it ends; wait for its first line."""
    bound = ["setpriv", "--pdeathsig", "KILL", *command]
    process = subprocess.Popen(
        bound, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, start_new_session=True
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError(f"{command[:8]} ended with {process.wait()}")
    return process


def _child(pid: int) -> int:
    """``unshare --fork`` stays outside; its child is inside."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
