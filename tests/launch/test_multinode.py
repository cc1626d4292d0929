"""Two hosts, each a set of namespaces with its own address and sshd, under every launcher; a host is lost; runs resume.

All runs are of one model, data and world, so each must log the losses of the one that nothing disturbed: to the last
bit on two hosts, within fp32 summation order on one.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.cluster import RANK, STARTED, Cluster
from tests.launch.hosts import Hosts, find, missing
from tests.launch.slurm import start_slurm

STEPS = 40
# Seconds that a rank waits for a silent one. From the cut to the end of everything: that, ssh's own patience with a
# host that does not answer (45 s), and a busy machine.
TIMEOUT = 12.0
ALL_ENDED = TIMEOUT + 45 + 60


def needs(*programs: str) -> pytest.MarkDecorator:
    reason = missing(*programs)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900), needs("pdsh")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cluster")
    with Hosts(folder / "hosts", ["host-a", "host-b"]) as hosts:
        yield Cluster(hosts, folder, STEPS, TIMEOUT)


@pytest.fixture(scope="module")
def whole(cluster) -> list[dict]:
    """Metrics of the run that nothing disturbed, on two hosts over pdsh."""
    code, said = cluster.output(cluster.start("pdsh", "whole"), STARTED)
    assert code == 0, said
    assert "host-a: layout     ZeRO-2, 2 ranks" in said
    rows = cluster.rows("whole")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    return rows


CHECKS = """
import contextlib, io, socket
from pathlib import Path
from lorapre_dist.launcher import app

def check(replace="", by="", *more):
    text = Path("{folder}/cluster.ini").read_text()
    Path("{folder}/check.ini").write_text(text.replace(replace, by))
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        code = app.main(["{folder}/check.ini", "--check", "--output_dir", "{folder}/none", *more])
    print(code, said.getvalue().strip())

check()
check("interface = lan0", "interface = ib0")
Path("{folder}/three").write_text("host-a slots=1\\nhost-c slots=1\\n")
check("hostfile = ", "hostfile = {folder}/three\\n# ")
with socket.create_server(("", 29500)):
    check()
"""


def test_what_is_missing_is_said_before_anything_starts(cluster):
    """All is there; a wrong interface; a host that is not there; a port in use."""
    code, said = cluster.output(cluster.python("-c", CHECKS.format(folder=cluster.folder)), STARTED)
    assert code == 0, said
    *_, ready, interface, host, port = said.strip().splitlines()
    assert ready == "0 ready: host-a (1), host-b (1)"
    assert "2 error: host-a: network interface ib0 has no IPv4 address; there: lan0, lo (and 1 more)" in interface
    assert "2 error: host-c: not reachable by ssh without a password: ssh: Could not resolve hostname host-c" in host
    assert port == "2 error: host-a: port 29500 is in use; set another master_port"


def test_stopped_then_cut_off_then_finished_on_one_host(cluster, whole):
    """``deepspeed --hostfile`` over pdsh: the front gets a signal, then a cable is pulled, then one host ends it."""
    hosts, name = cluster.hosts, "pdsh"
    process = cluster.start("pdsh", name)
    cluster.wait_for_step(name, 7, process)
    assert hosts.signal("host-a", r"launch/run\.py", signal.SIGTERM) == 1
    code, said = cluster.output(process, 90)
    stopped = cluster.rows(name)[-1]["step"]
    assert code == 75, said
    assert "SIGTERM: asking the ranks on host-a, host-b to save and stop" in said
    assert f"stopped by SIGUSR1 after step {stopped}: saved in " in said
    assert f"the same command resumes from step{stopped:07d}" in said
    cluster.nobody_left(10)

    process = cluster.start("pdsh", name)
    cluster.wait_for_step(name, stopped + 7, process)
    hosts.cut_off("host-b")
    begun = time.monotonic()
    code, said = cluster.output(process, ALL_ENDED)
    assert code not in (0, 75, -signal.SIGKILL), said
    assert f"resuming from step{stopped:07d} at step {stopped}" in said
    assert "error on rank 0 (host-a): lost another rank in step" in said, said
    assert "Traceback" not in said
    cluster.nobody_left(max(1.0, ALL_ENDED - (time.monotonic() - begun)))
    reached = len(cluster.rows(name))
    assert cluster.rows(name) == whole[:reached]  # through the stop and the resume, to the last bit

    code, said = cluster.output(cluster.start("pdsh", name, "--hosts", "host-a"), STARTED)
    hosts.reconnect("host-b")
    assert code == 0, said
    assert "resuming from step" in said and "ZeRO-2, 1 ranks" in said
    ours, theirs = cluster.losses(name), [row["loss"] for row in whole[1:]]
    assert len(ours) == STEPS
    # One rank adds up the batch in another order than two: fp32 rounding, over the steps since the resume.
    assert ours == pytest.approx(theirs, rel=1e-4)


@needs("ompi_info", "mpirun.openmpi", "mpirun.mpich")
def test_the_other_launchers_take_over_from_each_other(cluster, whole):
    """A rank under Open MPI is killed, MPICH goes on and is stopped, torchrun loses a rank, restarts and ends."""
    pytest.importorskip("mpi4py")
    hosts, name = cluster.hosts, "others"
    process = cluster.start("openmpi", name, PATH=mpirun_first(cluster.folder, "openmpi"))
    cluster.wait_for_step(name, 7, process)
    hosts.signal("host-b", RANK, signal.SIGKILL)
    code, said = cluster.output(process, 90)
    assert code not in (0, 75, -signal.SIGKILL), said
    assert "the same command resumes from step0000005" in said
    cluster.nobody_left(30)

    process = cluster.start("mpich", name, PATH=mpirun_first(cluster.folder, "mpich"))
    cluster.wait_for_step(name, 14, process)
    hosts.signal("host-a", r"launch/run\.py", signal.SIGTERM)
    code, said = cluster.output(process, 90)
    # DeepSpeed's helper for MPICH hides the exit codes of the ranks from everybody; the front knows what it asked for.
    assert code == 75, said
    assert "resuming from step0000005 at step 5" in said

    process = cluster.start("torchrun", name)
    cluster.wait_for_step(name, 25, process)
    hosts.signal("host-b", RANK, signal.SIGKILL)
    code, said = cluster.output(process, STARTED)
    assert code == 0, said
    assert said.count("resuming from step") >= 2, said
    assert cluster.rows(name) == whole


@needs("slurmctld", "slurmd", "munged")
def test_slurm_requeues(cluster, whole):
    """A real Slurm on both hosts: its signal stops the job resumable, the job goes back into the queue and ends."""
    name, config = "slurm", start_slurm(cluster.hosts)
    code, said = cluster.output(cluster.start("slurm", name, SLURM_CONF=config), 120)
    assert code == 0 and "Submitted batch job 1" in said

    def slurm(*command: str) -> str:
        return cluster.hosts.run("host-a", ["env", f"SLURM_CONF={config}", *command])

    cluster.wait_for_step(name, 7)
    slurm("scancel", "--signal=USR1", "1")
    cluster.wait(lambda: "PENDING" in slurm("squeue", "-h", "-o", "%T"), 60)
    # Slurm lets a requeued job wait for two minutes.
    slurm("scontrol", "update", "JobId=1", "StartTime=now")
    # squeue is empty for a moment before the job runs again.
    cluster.wait(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", "1"), STARTED)
    log = (cluster.folder / "slurm.out").read_text()
    assert "goes back into the queue" in log and "resuming from step" in log
    assert cluster.rows(name) == whole


def mpirun_first(folder: Path, family: str) -> str:
    """A PATH on which ``mpirun`` is that of ``family``, where Debian has several."""
    programs = folder / f"bin-{family}"
    programs.mkdir(exist_ok=True)
    program, real = programs / "mpirun", str(find(f"mpirun.{family}"))
    program.unlink(missing_ok=True)
    if family == "mpich":  # looks for its other programs where it was called, so no link
        program.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
        program.chmod(0o755)
    else:  # called by a full path it would put /usr/bin, and another ninja, first on the PATH of the ranks
        program.symlink_to(real)
    return f"{programs}{os.pathsep}{os.environ['PATH']}"
