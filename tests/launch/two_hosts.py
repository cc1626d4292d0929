"""Two hosts, one lost, the run resumed: a transcript of real runs. As root: ``python -m tests.launch.two_hosts``."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.launch.cluster import Cluster
from tests.launch.hosts import Hosts, missing

TIMEOUT = 20.0
SHOWN = re.compile(r"host-[ab]: (layout|batch|error|warning|resuming|eval loss)|^(error|ended|ready)")
COMMAND = "python launch/run.py cluster.ini --launcher pdsh"


def tell(cluster: Cluster, process: subprocess.Popen[str], told: int = 0) -> int:
    """Print the lines that tell the story, of many that DeepSpeed and torch print, but the first ``told``; how many."""
    lines = [line for line in cluster.said(process).splitlines() if SHOWN.search(line) and "state over" not in line]
    for line in lines[told:]:
        print(line.replace(f"{cluster.folder}/", ""), flush=True)
    return len(lines)


def finish(cluster: Cluster, process: subprocess.Popen[str], told: int = 0) -> None:
    begun = time.monotonic()
    code, _ = cluster.output(process, 600)
    tell(cluster, process, told)
    print(f"[exit code {code} after {time.monotonic() - begun:.0f} s]\n", flush=True)


def run(cluster: Cluster, name: str, *more: str) -> None:
    print(f"host-a$ {shlex.join([*COMMAND.split(), '--output_dir', name, *more])}", flush=True)
    finish(cluster, cluster.start("pdsh", name, *more))


def main() -> int:
    if (reason := missing("pdsh")) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder) / "hosts", ["host-a", "host-b"]) as hosts:
        cluster = Cluster(hosts, Path(folder), steps=60, timeout=TIMEOUT)
        for name in hosts.names:
            print(f"{name}: {hosts.run(name, ['ip', '-4', '-brief', 'addr', 'show', 'lan0']).strip()}")
        print(f"host-a$ cat hosts\n{hosts.hostfile(1).read_text()}", flush=True)
        run(cluster, "undisturbed")

        print(f"host-a$ {COMMAND} --output_dir disturbed", flush=True)
        process = cluster.start("pdsh", "disturbed")
        cluster.wait_for_step("disturbed", 22, process)
        hosts.cut_off("host-b")
        told = tell(cluster, process)
        print(f"[host-b's cable is pulled after step {cluster.rows('disturbed')[-1]['step']}]", flush=True)
        finish(cluster, process, told)
        cluster.nobody_left(120)
        print("[no rank is left on either host]\n", flush=True)

        run(cluster, "disturbed")
        run(cluster, "disturbed", "--hosts", "host-a")
        pairs = zip(cluster.losses("undisturbed"), cluster.losses("disturbed"), strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        print(f"largest difference between the two runs' {cluster.steps} losses: {apart:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
