"""A small Slurm on the hosts: a controller on the first, a daemon on each, one partition of all."""

from __future__ import annotations

import os
import time

from tests.launch.hosts import Hosts

CONFIG = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation=/run/slurmctld
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
NodeName={names} CPUs={cpus} RealMemory=500 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start_slurm(hosts: Hosts) -> str:
    """Start it and wait until all hosts are idle; the value for ``SLURM_CONF``."""
    folder = hosts.folder
    config = folder / "slurm.conf"
    names = {"first": hosts.names[0], "names": ",".join(hosts.names)}
    config.write_text(CONFIG.format(folder=folder, cpus=os.cpu_count(), **names))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(64))
    for name in hosts.names:
        munged = f"munged --force --key-file={key} --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid"
        logs = f"--log-file={folder}/munged-{name}.log --seed-file=/run/munge/seed"
        hosts.run(name, ["bash", "-c", f"mkdir -p -m 755 /run/munge /run/slurmctld /run/slurmd && {munged} {logs}"])
    slurm = ["env", f"SLURM_CONF={config}"]
    hosts.run(hosts.names[0], [*slurm, "slurmctld"])
    for name in hosts.names:
        hosts.run(name, [*slurm, "slurmd"])
    end = time.monotonic() + 60
    while hosts.run(hosts.names[0], [*slurm, "sinfo", "-h", "-t", "idle", "-o", "%D"]).strip() != str(len(hosts.names)):
        if time.monotonic() > end:
            raise RuntimeError(f"Slurm's hosts are not idle; see {folder}/slurmctld.log")
        time.sleep(0.2)
    return str(config)
